"""One side of the GPU benchmark in a process of its own: ``python -m tests.benchmarks.gpu_sides SPEC``.

The specification is JSON. The last line that it prints is the result.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from lightning_rlhf.data.prompt_batch import PromptBatch
from tests.benchmarks import gpu_models
from tests.benchmarks.worker import peak, reset_peak
from tests.tokenizers import letters

GIB = 2**30
BETA = 0.1


@dataclass(frozen=True)
class Spec:
    """What is measured.

    Attributes:
        side: ``ours`` or ``trl``.
        task: ``sft``, ``dpo``, ``reward``, ``kto`` or ``ppo``.
        shape: Of the model.
        device: ``cuda`` or ``cpu``.
        steps: Measured, after one to warm up.
        batch_size: Prompts a step.
        prompt: Tokens of a prompt, where ``assets`` does not say.
        completion: Tokens of a completion, likewise; of PPO always.
        assets: Folder of the real data that gives the lengths; none for fixed ones.
        cap: GiB of the GPU that may be used; 0 for all.
        checkpointing: Of both sides; TRL knows no selective one, and takes all.
        compile: Our decoder layers.
        num_epochs: Of PPO.
        trl_ppo: Folder of the TRL that still has PPO.
    """

    side: str
    task: str
    shape: str
    device: str
    steps: int
    batch_size: int
    prompt: int
    completion: int
    assets: str = ""
    cap: float = 0.0
    checkpointing: bool | str = True
    compile: bool = False
    num_epochs: int = 1
    trl_ppo: str = ""


@dataclass
class Meter:
    """Seconds, tokens and losses of steps, the first one apart."""

    device: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def start(self) -> None:
        if not self.seconds:
            torch.cuda.reset_peak_memory_stats() if self.device == "cuda" else reset_peak()
        self._wait()
        self._began = time.perf_counter()

    def stop(self, loss: float, tokens: int, share: float = 0.0) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self._began)
        self.tokens.append(tokens)
        self.losses.append(loss)
        self.shares.append(share)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def result(self) -> dict[str, Any]:
        most = torch.cuda.max_memory_allocated() / GIB if self.device == "cuda" else peak() / 1024
        rest = {"seconds": self.seconds[1:], "tokens": self.tokens[1:], "losses": self.losses}
        return {**rest, "generation_shares": self.shares[1:], "peak_gib": most}


def batches(spec: Spec) -> list[list[PromptGroup]]:
    """The same for both sides."""
    vocabulary = gpu_models.config_of(spec.shape).vocab_size
    count, draw = (spec.steps + 1) * spec.batch_size, random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(length)]

    lengths = [(spec.prompt, spec.completion, spec.completion)] * count
    if spec.assets:
        from tests.benchmarks.workload import load

        real = [g for batch in load("dpo", Path(spec.assets), count).batches for g in batch][:count]
        lengths = [(len(g.prompt), len(g.completions[0]), len(g.completions[1])) for g in real]
    answers = 1 if spec.task == "sft" else 2
    groups = [
        PromptGroup(
            ids(prompt),
            [] if spec.task == "ppo" else [ids(length) for length in several[:answers]],
            row_id=row,
            extras={"label": float(row % 2)} if spec.task == "kto" else {},
        )
        for row, (prompt, *several) in enumerate(lengths)
    ]
    return [groups[at : at + spec.batch_size] for at in range(0, count, spec.batch_size)]


# --- ours -------------------------------------------------------------------------------------------------------------


class Steps(L.Callback):
    """Measure a Trainer's steps."""

    def __init__(self, meter: Meter, spec: Spec) -> None:
        self.meter, self.spec = meter, spec

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.meter.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.spec.task != "ppo":
            loss = float(outputs["loss"].detach() if isinstance(outputs, dict) else outputs.detach())
            self.meter.stop(loss, len(batch.input_ids))
            return
        logged = trainer.callback_metrics
        tokens = sum(map(len, batch.prompt_ids)) + len(batch) * self.spec.completion
        share = float(logged["train/time/generation_share"])
        self.meter.stop(float(logged["train/objective/scores"]), tokens, share)


def ours(spec: Spec, meter: Meter, folder: Path) -> None:
    """A stock Trainer."""
    from tests.benchmarks.ppo_sides import _prompt_batch

    module = _module(spec, folder)
    made: list[PackedBatch | PromptBatch] = [
        _prompt_batch(groups) if spec.task == "ppo" else pack(groups) for groups in batches(spec)
    ]
    L.Trainer(
        accelerator=spec.device,
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Steps(meter, spec)],
        default_root_dir=folder,
    ).fit(module, DataLoader(made, batch_size=None, collate_fn=_same))


def _same(batch: Any) -> Any:
    return batch


def _module(spec: Spec, folder: Path) -> Any:
    from lightning_rlhf import DPO, KTO, PPO, SFT, RewardModel
    from lightning_rlhf.algorithms import Update
    from lightning_rlhf.generation import Sampling
    from lightning_rlhf.objectives import Sigmoid
    from lightning_rlhf.rewards import RewardModelReward

    model = gpu_models.policy(spec.shape, spec.device, spec.checkpointing, compile=spec.compile)
    common: dict[str, Any] = {"tokenizer": letters(), "optimization": _optimization()}
    if spec.task == "ppo":
        reward = RewardModelReward(gpu_models.write_reward(model, folder), letters(), share_base=True)
        length = spec.completion
        return PPO(
            model,
            reward,
            sampling=Sampling(max_new_tokens=length, min_new_tokens=length),
            update=Update(num_epochs=spec.num_epochs, minibatch_size=spec.batch_size, micro_batch_size=1),
            critic="adapter",
            **common,
        )
    algorithms = {"sft": SFT, "reward": RewardModel}
    if spec.task in algorithms:
        return algorithms[spec.task](model, **common)
    return (
        KTO(model, beta=BETA, **common)
        if spec.task == "kto"
        else DPO(model, objective=Sigmoid(beta=BETA), **common)
    )


def _optimization() -> Any:
    from lightning_rlhf.algorithms import Optimization

    return Optimization(lr=1e-5, schedule="constant", name="paged_adamw_8bit")


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl(spec: Spec, meter: Meter, folder: Path) -> None:
    """TRL's ``compute_loss``, backward and the same optimizer, on the same base with the same adapter settings."""
    from trl.trainer.utils import disable_dropout_in_model

    from lightning_rlhf.algorithms.optimization import build_optimizer
    from tests.benchmarks.trl_side import ROWS
    from tests.benchmarks.workload import num_terms

    trainer = _trl_trainer(spec, folder)
    model = trainer.accelerator.prepare_model(trainer.model)
    disable_dropout_in_model(model)
    model.train()
    optimizer = build_optimizer(model.named_parameters(), _optimization())
    for groups in batches(spec):
        inputs = trainer._prepare_inputs(trainer.data_collator(ROWS[spec.task](groups)))
        tokens = sum(inputs[name].numel() for name in ("input_ids", "KL_input_ids") if name in inputs)
        meter.start()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        meter.stop(loss.item() * num_terms(pack(groups), spec.task), tokens)  # type: ignore[arg-type]


def _trl_trainer(spec: Spec, folder: Path) -> Any:
    import trl
    from datasets import Dataset

    from lightning_rlhf.models import LoRA
    from lightning_rlhf.models.loading import lora_config

    common: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": spec.device == "cpu",
        "bf16": True,
        "gradient_checkpointing": bool(spec.checkpointing),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "no",
        "per_device_train_batch_size": spec.batch_size,
        "max_length": None,
    }
    pair, answer = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b"}
    row, kind, args = {
        "sft": lambda: (answer, trl.SFTTrainer, trl.SFTConfig(**common)),
        "dpo": lambda: (pair, trl.DPOTrainer, trl.DPOConfig(beta=BETA, **common)),
        "kto": lambda: ({**answer, "label": True}, trl.KTOTrainer, trl.KTOConfig(beta=BETA, **common)),
        "reward": lambda: (pair, trl.RewardTrainer, trl.RewardConfig(**common)),
    }[spec.task]()
    adapter = lora_config(LoRA())
    if spec.task == "reward":
        adapter.task_type = "SEQ_CLS"
    return kind(
        gpu_models.base(spec.shape, spec.device, head=spec.task != "reward"),
        args=args,
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=letters(),
        peft_config=adapter,
    )


def trl_ppo(spec: Spec, meter: Meter, folder: Path) -> None:
    """The last TRL that has PPO: reward and value are models of their own there, both in 4 bits, the value by LoRA."""
    sys.path.insert(0, spec.trl_ppo)
    from datasets import Dataset
    from peft import get_peft_model
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from lightning_rlhf.models import LoRA
    from lightning_rlhf.models.loading import lora_config
    from tests.benchmarks.ppo_sides import left_padded

    adapter = lora_config(LoRA())
    of_value = lora_config(LoRA())
    of_value.task_type = "SEQ_CLS"
    reward = gpu_models.base(spec.shape, spec.device, head=False).eval().requires_grad_(False)
    value = get_peft_model(gpu_models.base(spec.shape, spec.device, head=False), of_value)
    args = PPOConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=spec.device == "cpu",
        bf16=True,
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=bool(spec.checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=1e-5,
        optim="paged_adamw_8bit",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=spec.batch_size,
        num_mini_batches=1,
        num_ppo_epochs=spec.num_epochs,
        local_rollout_forward_batch_size=1,
        response_length=spec.completion,
        temperature=1.0,
        total_episodes=(spec.steps + 1) * spec.batch_size,
        num_sample_generations=0,
    )
    rows = Dataset.from_list([{"input_ids": [5]}] * spec.batch_size)
    policy = gpu_models.base(spec.shape, spec.device)
    trainer = PPOTrainer(
        args, letters(), policy, None, reward, rows, value, eval_dataset=rows, peft_config=adapter
    )

    def served() -> Iterator[dict[str, Any]]:
        for groups in batches(spec):
            meter.start()
            try:
                yield {"input_ids": left_padded(groups)[0].to(spec.device)}
            finally:  # of the last batch when the trainer lets go of it
                meter.stop(float("nan"), sum(len(group.prompt) + spec.completion for group in groups))

    trainer.dataloader = served()
    # It has cast the norms of a policy in 4 bits to float32, and samples outside of autocast, where the head in
    # bfloat16 would refuse what they give.
    with torch.autocast(spec.device, dtype=torch.bfloat16):
        trainer.train()


def main(text: str) -> dict[str, Any]:
    """Run a side; what was measured, or that memory was not enough."""
    spec = Spec(**json.loads(text))
    if spec.cap and spec.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec.cap * GIB / total))
    meter = Meter(spec.device)
    run = ours if spec.side == "ours" else trl_ppo if spec.task == "ppo" else trl
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        try:
            run(spec, meter, Path(folder))
        except torch.OutOfMemoryError as problem:
            return {"out_of_memory": str(problem).splitlines()[0]}
    return meter.result()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
