"""The steps that are compared: ours in a Lightning Trainer, ours in a bare loop, and TRL's in its settings."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from tests.benchmarks.workload import BETA, LEARNING_RATE, Task, llama

# After each step: loss summed over the batch, and tokens in a forward pass, padding included.
Report = tuple[float, int]
Groups = list[PromptGroup]
NextBatch = Callable[[Callable[[Groups], Any]], Any]

# TRL 1.16 with what makes it slower switched off. ``padding_free`` is refused by its DPO ("temporarily unavailable").
TRL_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "dpo": {
        "padded, sdpa": {},
        "padded, eager attention": {"attention": "eager"},
        "padded, sdpa, activation checkpointing": {"activation_checkpointing": True},
    },
    "sft": {
        "padded, sdpa": {},
        "padding_free, sdpa": {"padding_free": True, "max_length": None},
        "packing bfd 1024, sdpa": {"packing": True, "packing_strategy": "bfd"},
        "packing wrapped 512, sdpa (documents see each other)": {
            "packing": True,
            "packing_strategy": "wrapped",
            "max_length": 512,
        },
    },
}


def ours_in_a_trainer(
    task: Task, precision: str, next_batch: NextBatch, done: Callable[[Report], None]
) -> None:
    """Run :class:`DPO` or :class:`SFT` in a stock Trainer; a step ends where the Trainer asks for the next batch."""
    import lightning as L
    from torch.utils.data import DataLoader, Dataset

    module = _module(task)

    class Served(Dataset):
        """A batch as soon as it is asked for from outside; with a length, so that the Trainer never reads ahead."""

        waiting = 0

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> PackedBatch:
            if self.waiting:
                done((float(module.last_loss), self.waiting))
            batch = next_batch(pack)
            self.waiting = len(batch.input_ids)
            return batch

    class KeepLoss(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            module.last_loss = outputs["loss"].detach()

    L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=1_000_000,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        callbacks=[KeepLoss()],
        default_root_dir=tempfile.gettempdir(),
    ).fit(module, DataLoader(Served(), batch_size=None, collate_fn=_same))


def ours_in_a_bare_loop(
    task: Task, precision: str, next_batch: NextBatch, done: Callable[[Report], None]
) -> None:
    """The same forward, loss, backward and optimizer without Trainer, hooks and metrics."""
    from lightning_rlhf.functional import sum_by_sequence
    from lightning_rlhf.objectives import Completions

    module = _module(task)
    optimizer = _adamw(module.policy)

    def loss_of(batch: PackedBatch) -> Tensor:
        tokens = module.policy(batch, with_entropy=True)
        if task == "sft":
            return -tokens.logprobs.sum()
        logps = sum_by_sequence(tokens.logprobs, batch.target_lengths)
        ref_logps = module.reference(batch)
        return module.objective(Completions(logps, batch.target_lengths, ref_logps).pairs()).sum()

    while True:
        batch = next_batch(pack)
        with _autocast(precision):
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done((loss.item(), len(batch.input_ids)))


def trl_step(
    task: Task, precision: str, setting: str, next_batch: NextBatch, done: Callable[[Report], None]
) -> None:
    """TRL's ``compute_loss``, backward and the same optimizer, in one of its settings."""
    from trl.trainer.utils import disable_dropout_in_model

    settings = dict(TRL_SETTINGS[task][setting])
    model: Any = llama()
    model.set_attn_implementation(settings.pop("attention", "sdpa"))
    trainer = _trl_trainer(task, model, precision, settings)
    disable_dropout_in_model(model)
    model.train()
    wrapped = trainer.accelerator.prepare_model(model)
    optimizer = _adamw(model)
    rows_of = _pairs if task == "dpo" else _demonstrations

    def collate(groups: Groups) -> tuple[dict[str, Any], int]:
        rows = rows_of(groups)
        if settings.get("packing"):
            rows = _packed(rows, trainer.args)
        # TRL's loss is a mean, ours a sum that the optimizer's hook divides: reported alike.
        count = len(groups) if task == "dpo" else sum(len(c) for g in groups for c in g.completions)
        return trainer._prepare_inputs(trainer.data_collator(rows)), count

    while True:
        inputs, count = next_batch(collate)
        num_tokens = inputs["input_ids"].numel()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(wrapped, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done((loss.item() * count, num_tokens))


def _same(batch: PackedBatch) -> PackedBatch:
    return batch


def _autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def _module(task: Task) -> Any:
    from lightning_rlhf.algorithms import DPO, SFT, Optimization
    from lightning_rlhf.objectives import Sigmoid
    from tests.tokenizers import letters

    optimization = Optimization(lr=LEARNING_RATE, schedule="constant")
    model: Any = llama()
    if task == "sft":
        return SFT(model, letters(), optimization=optimization)
    return DPO(model, letters(), objective=Sigmoid(beta=BETA), optimization=optimization)


def _trl_trainer(task: Task, model: Any, precision: str, settings: dict[str, Any]) -> Any:
    import trl
    from datasets import Dataset

    from tests.tokenizers import letters

    common = {
        "output_dir": tempfile.mkdtemp(prefix="benchmark-"),
        "report_to": [],
        "use_cpu": True,
        "bf16": precision == "bf16-mixed",
        "activation_checkpointing": False,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        **settings,
    }
    if task == "dpo":
        rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        args = trl.DPOConfig(beta=BETA, **common)
        reference = copy.deepcopy(model).requires_grad_(False)
        return trl.DPOTrainer(model, reference, args=args, train_dataset=rows, processing_class=letters())
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    args = trl.SFTConfig(**common)
    return trl.SFTTrainer(model, args=args, train_dataset=rows, processing_class=letters())


def _pairs(groups: Groups) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": g.prompt, "chosen_ids": g.completions[0], "rejected_ids": g.completions[1]}
        for g in groups
    ]


def _demonstrations(groups: Groups) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": [*g.prompt, *g.completions[0]],
            "labels": [-100] * len(g.prompt) + list(g.completions[0]),
        }
        for g in groups
    ]


def _packed(rows: list[dict[str, Any]], args: Any) -> list[dict[str, Any]]:
    import trl
    from datasets import Dataset

    packed: Iterator[dict[str, Any]] = iter(
        trl.pack_dataset(Dataset.from_list(rows), args.max_length, args.packing_strategy)
    )
    return list(packed)
