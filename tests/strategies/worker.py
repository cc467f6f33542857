"""Cells of the matrix of strategies, several in one process or group of processes: see test_matrix."""

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision.fsdp import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    OptimStateKeyType,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_rlhf.algorithms import (
    DPO,
    GAE,
    KTO,
    PPO,
    SFT,
    KLControl,
    OnlineDPO,
    Optimization,
    RewardModel,
    Update,
)
from lightning_rlhf.algorithms.odin import ODIN
from lightning_rlhf.algorithms.token_heads import TokenHead
from lightning_rlhf.callbacks import ExactResume
from lightning_rlhf.data.packing import pack
from lightning_rlhf.generation import Sampling, generate
from lightning_rlhf.generation.adapter_files import written_adapter
from lightning_rlhf.models import LoRA, Policy, Quantization
from tests.algorithms.conftest import labelled, random_groups
from tests.algorithms.rollouts import Waves, prompts
from tests.strategies.zero import ZeroOnCPU, cases

ROWS = 8
"""An optimizer step, all ranks together; an epoch is two of them, and a run two epochs."""
NF4 = Quantization(compute_dtype="float32")
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Cell(NamedTuple):
    """One place of the matrix."""

    algorithm: str
    weights: str
    strategy: str
    options: tuple[str, ...] = ()

    @staticmethod
    def named(name: str) -> "Cell":
        algorithm, weights, strategy, *options = name.split("-")
        return Cell(algorithm, weights, strategy, tuple(options))

    @property
    def name(self) -> str:
        return "-".join((self.algorithm, self.weights, self.strategy, *self.options))


class OnCPU(FSDPStrategy):
    """FSDP1 on the CPU: the Trainer refuses exactly its class, and its name.

    Lightning offloads what it saves to the CPU. PyTorch takes that for a copy, which it is not where all is on the CPU
    already: weights are freed before they are saved, and every state of the optimizer is the last one.
    """

    def whole(self):
        here = {"offload_to_cpu": False, "rank0_only": True}
        configs = FullStateDictConfig(**here), FullOptimStateDictConfig(**here)
        return FSDP1.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, *configs)

    def lightning_module_state_dict(self):
        with self.whole():
            return self.model.state_dict()

    def optimizer_state(self, optimizer):
        with self.whole():
            state = FSDP1.optim_state_dict(self.model, optimizer)
        by_place = OptimStateKeyType.PARAM_ID
        return FSDP1.rekey_optim_state_dict(state, by_place, self.model) if self.is_global_zero else state


class HalfOnCPU(FSDPPrecision):
    """Mixed precision of FSDP1, which is autocast on CUDA whatever the device."""

    def forward_context(self):
        return torch.autocast("cpu", torch.bfloat16)


class Losses(Callback):
    """What is logged at every step, and how large its gradient was."""

    def __init__(self):
        self.found, self.norms, self.clipped = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if isinstance(trainer.strategy, ZeroOnCPU):
            self.norms = trainer.strategy.norms
            return
        self.norms.append(gradient_norm(module) * trainer.world_size)  # the ranks' mean so far

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        # Of manual steps the gradient is gone, and DeepSpeed has it.
        if module.automatic_optimization and not isinstance(trainer.strategy, ZeroOnCPU):
            self.clipped.append(gradient_norm(module))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        # The module logs after the callbacks of a batch's end, so each loss is read at the next start.
        if "train/loss" in trainer.callback_metrics or "train/loss/policy_avg" in trainer.callback_metrics:
            wanted = ("train/loss", "train/loss/policy_avg", "train/loss/value_avg", "train/objective/kl")
            values = {n: float(v) for n, v in trainer.callback_metrics.items() if n in wanted}
            self.found.append(values)

    def on_train_epoch_end(self, trainer, module):
        self.on_train_batch_start(trainer, module, None, 0)
        trainer.callback_metrics.clear()


def gradient_norm(module: L.LightningModule) -> float:
    """Of the whole gradient, wherever its parts are."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    if isinstance(module.trainer.strategy, FSDPStrategy):
        torch.distributed.all_reduce(square := norm.square())
        norm = square.sqrt()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def module_of(cell: Cell, model_dir: str) -> L.LightningModule:
    targets = ["q_proj"] if "narrow" in cell.options else "all-linear"
    lora = None if cell.weights == "full" else LoRA(r=2, init="gaussian", target_modules=targets)
    casts = cell.strategy.startswith("zero") and "bf16_true" in cell.options
    quantization = Quantization(compute_dtype="bfloat16") if casts else NF4
    policy = Policy(
        model_dir,
        lora=lora,
        quantization=quantization if cell.weights == "nf4" else None,
        gradient_checkpointing="checkpointing" in cell.options,
        compile="compiled" in cell.options,
    )
    decay = 0.1 if "decay" in cell.options else 0.0
    settings: dict[str, Any] = {
        "optimization": Optimization(lr=1e-3, schedule="constant", weight_decay=decay)
    }
    ppo = {
        "estimator": GAE(),
        "kl": KLControl(coef=0.1, target=0.01, horizon=50),
        "update": Update(num_epochs=2, minibatch_size=64, micro_batch_size=3, max_grad_norm=0.01),
    }
    if "follow" in cell.options:
        settings["reference_update_steps"] = 1
    if "token" in cell.options:
        settings["token_head"] = TokenHead()
    make = {
        "SFT": SFT,
        "RewardModel": RewardModel,
        "DPO": DPO,
        "KTO": KTO,
        "PPO": partial(PPO, reward=Waves(), sampling=Sampling(max_new_tokens=6, num_samples=2), **ppo),
        "OnlineDPO": partial(OnlineDPO, reward=Waves(), sampling=Sampling(max_new_tokens=6, num_samples=3)),
    }[cell.algorithm]
    return make(policy, **settings)


def loader_of(algorithm: str, world: int) -> DataLoader:
    """This rank's part of each step's rows: all ranks together see the same rows on any number of them."""
    if algorithm in ("PPO", "OnlineDPO"):
        loader = prompts(2 * ROWS)
        rows, collate = loader.dataset, loader.collate_fn
    else:
        rows = labelled(2 * ROWS) if algorithm == "KTO" else random_groups(2 * ROWS, 1 + (algorithm != "SFT"))
        collate = pack
    sampler = DistributedSampler(rows, world, int(os.environ.get("RANK", 0)), shuffle=False)
    return DataLoader(rows, batch_size=ROWS // world, sampler=sampler, collate_fn=collate)


def strategy_of(cell: Cell, world: int):
    if cell.strategy == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=world,
            tensor_parallel_size=1,
            save_distributed_checkpoint="sharded" in cell.options,
        )
    if cell.strategy.startswith("zero"):
        return ZeroOnCPU(stage=int(cell.strategy[-1]))
    if cell.strategy == "fsdp1":
        return OnCPU(sharding_strategy="SHARD_GRAD_OP" if "grad_op" in cell.options else "FULL_SHARD")
    return cell.strategy if world > 1 else "auto"


def run(cell: Cell, model_dir: str, folder: Path, world: int, ckpt: Path | None = None) -> dict[str, Any]:
    """Train two epochs, or the second one from a checkpoint; what was logged, and where the checkpoints are."""
    L.seed_everything(0, verbose=False)
    module = module_of(cell, model_dir)
    losses = Losses()
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    precision = next((o.replace("_", "-") for o in cell.options if o.startswith("bf16")), "32-true")
    half = cell.strategy == "fsdp1" and precision == "bf16-mixed"
    trainer = L.Trainer(
        devices=world,
        strategy=strategy_of(cell, world),
        max_epochs=2,
        **({"plugins": HalfOnCPU(precision)} if half else {"precision": precision}),
        gradient_clip_val=None if cell.algorithm == "PPO" else 0.01,
        callbacks=[losses, ExactResume(), saver, *([Uneven()] if "uneven" in cell.options else [])],
        log_every_n_steps=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        **QUIET,
    )
    loader = loader_of(cell.algorithm, world)
    trainer.fit(module, loader, loader, ckpt_path=ckpt)
    kept = {p.dtype for p in module.parameters() if p.requires_grad}
    in_half = "zero" in cell.strategy and "bf16" in cell.name  # the float32 copies are the optimizer's
    assert kept == {torch.bfloat16 if in_half else torch.float32}, kept
    tokens = int(module.num_tokens.compute())
    return {
        "losses": losses.found,
        "norms": losses.norms,
        "clipped": losses.clipped,
        "steps": trainer.global_step,
        "tokens": tokens,
    }


class Uneven(Callback):
    """Sample after every batch, as many prompts as the rank is high, one at a time, to lengths that differ."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        before = shards(module)
        prompts = [[5, 6, 7], [8], [9, 10]][: 1 + 2 * trainer.global_rank]
        how = Sampling(max_new_tokens=3 + 4 * trainer.global_rank, batch_size=1)
        drawn = list(generate(module.policy, module.tokenizer, prompts, how, seeds=range(len(prompts))))
        assert len(drawn) == len(prompts)
        assert not module.policy.is_gathered
        if isinstance(trainer.strategy, FSDPStrategy):
            with pytest.raises(ValueError, match="sample with HFGenerator"), written_adapter(module.policy):
                pass
        after = shards(module)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def shards(module: L.LightningModule) -> list[torch.Tensor]:
    """This rank's part of what is trained."""
    trained = [p.detach() for p in module.parameters() if p.requires_grad]
    return [(p.to_local() if isinstance(p, DTensor) else p).clone() for p in trained]


def refusals(model_dir: str) -> dict[str, str]:
    """What is refused under FSDP2 and FSDP1, and how."""
    small = partial(PPO, model_dir, Waves(), sampling=Sampling(max_new_tokens=2))
    eight_bit = Optimization(name="adamw_8bit")
    modules = {
        "tensor": SFT(model_dir),
        "8bit": SFT(model_dir, optimization=eight_bit),
        "odin": RewardModel(model_dir, odin=ODIN()),
        "tokens": small(update=Update(micro_batch_tokens=64)),
        "uneven": small(update=Update(minibatch_size=4)),
        "fsdp1-8bit": SFT(model_dir, optimization=eight_bit),
        "fsdp1-odin": RewardModel(model_dir, odin=ODIN()),
        "fsdp1-tokens": small(update=Update(micro_batch_tokens=64)),
        "fsdp1-dtypes": SFT(Policy(model_dir, dtype="bfloat16", lora=LoRA(r=2))),
        "fsdp1-half": SFT(Policy(model_dir, lora=LoRA(r=2))),
        "fsdp1-whole": SFT(model_dir),
    }
    mine = prompts(3 + 2 * int(os.environ["RANK"]), 8)
    sampler = DistributedSampler(mine.dataset, 1, 0)  # in the name of all ranks, so that Lightning leaves it
    other = DataLoader(mine.dataset, batch_size=8, sampler=sampler, collate_fn=mine.collate_fn)
    found = {}
    for name, module in modules.items():
        sizes = {} if name == "tensor" else {"data_parallel_size": 2, "tensor_parallel_size": 1}
        older = OnCPU(sharding_strategy="NO_SHARD" if name == "fsdp1-whole" else "FULL_SHARD")
        trainer = L.Trainer(
            devices=2,
            strategy=older if name.startswith("fsdp1") else ModelParallelStrategy(**sizes),
            precision="bf16-true" if name == "fsdp1-half" else "32-true",
            max_steps=2,
            enable_checkpointing=False,
            **QUIET,
        )
        try:
            trainer.fit(module, other if name == "uneven" else loader_of(type(module).__name__, 2))
        except ValueError as error:
            found[name] = str(error)
    return found


def main(world: int, model_dir: str, folder: Path, names: list[str]) -> None:
    """Every cell: trained, and resumed from its first epoch; ``NAME=CHECKPOINT`` is only resumed, from there."""
    torch.set_num_threads(1)
    if names[0] == "refusals":
        torch.save(refusals(model_dir), folder / f"refusals.{os.environ['RANK']}")
        names = names[1:]
    if names[0] == "zero":
        torch.save(cases(model_dir), folder / f"zero.{os.environ['RANK']}")
        names = names[1:]
    for entry in names:
        name, _, ckpt = entry.partition("=")
        cell, place = Cell.named(name), folder / name
        if ckpt:
            found = {"resumed": run(cell, model_dir, place, world, ckpt=Path(ckpt))}
        else:
            found = {
                "whole": run(cell, model_dir, place, world),
                "resumed": run(cell, model_dir, place / "again", world, ckpt=place / "epoch=0.ckpt"),
            }
        torch.save(found, folder / f"{name}.{os.environ.get('RANK', 0)}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
