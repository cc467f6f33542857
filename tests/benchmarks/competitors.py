"""Our side of what is compared: a step in a Lightning Trainer, and one in a bare loop."""

import itertools
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from tests.benchmarks.workload import BETA, LEARNING_RATE, Task, llama, score_weights

# After each step: loss summed over the batch, and tokens in a forward pass, padding included.
Report = tuple[float, int]
Groups = list[PromptGroup]
NextBatch = Callable[[Callable[[Groups], Any]], Any]


def ours_in_a_trainer(
    task: Task,
    precision: str,
    next_batch: NextBatch,
    done: Callable[[Report], None],
    *,
    apart: bool = False,
) -> None:
    """Run an algorithm in a stock Trainer; a step ends where the Trainer asks for the next batch.

    Args:
        task: Which algorithm.
        precision: Of the Trainer.
        next_batch: Waits for groups, and returns what it is told to make of them.
        done: Told of every step.
        apart: Every comparison of a ranked group as a pair of its own; the losses are then per prompt all the same.
    """
    import lightning as L
    from torch.utils.data import DataLoader, Dataset

    module = module_of(task)

    class Served(Dataset):
        """A batch as soon as it is asked for from outside; with a length, so that the Trainer never reads ahead."""

        waiting = 0
        weight = 1.0

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> PackedBatch:
            if self.waiting:
                done((float(module.last_loss) / self.weight, self.waiting))
            batch, self.weight = next_batch(_pairs_apart if apart else _together)
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
    module = module_of(task)
    optimizer = adamw(module.policy)
    while True:
        batch = next_batch(pack)
        done((bare_step(module, optimizer, task, precision, batch), len(batch.input_ids)))


def bare_step(
    module: Any, optimizer: torch.optim.Optimizer, task: Task, precision: str, batch: PackedBatch
) -> float:
    """Forward, loss, backward and optimizer; returns the loss, summed over the batch."""
    from lightning_rlhf.functional import sum_by_sequence
    from lightning_rlhf.objectives import Completions

    def loss_of() -> Tensor:
        tokens = module.policy(batch, with_entropy=True)
        if task == "sft":
            return -tokens.logprobs.sum()
        logps = sum_by_sequence(tokens.logprobs, batch.target_lengths)
        ref_logps = module.reference(batch)
        return module.objective(Completions(logps, batch.target_lengths, ref_logps).pairs()).sum()

    with _autocast(precision):
        loss = loss_of()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _together(groups: Groups) -> tuple[PackedBatch, float]:
    return pack(groups), 1.0


def _pairs_apart(groups: Groups) -> tuple[PackedBatch, float]:
    """All pairs of ranked groups, and how many comparisons a prompt has, by which our loss divides."""
    pairs = [
        PromptGroup(group.prompt, pair, row_id=group.row_id)
        for group in groups
        for pair in itertools.combinations(group.completions, 2)
    ]
    return pack(pairs), len(pairs) / len(groups)


def _same(batch: PackedBatch) -> PackedBatch:
    return batch


def _autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def module_of(task: Task, model: Any = None) -> Any:
    """Our module of a task, with a random Llama unless another model is given."""
    from lightning_rlhf.algorithms import DPO, KTO, SFT, Optimization, RewardModel
    from lightning_rlhf.objectives import Sigmoid
    from tests.tokenizers import letters

    optimization = Optimization(lr=LEARNING_RATE, schedule="constant")
    model = llama() if model is None else model
    if task == "sft":
        return SFT(model, letters(), optimization=optimization)
    if task == "kto":
        return KTO(model, letters(), beta=BETA, optimization=optimization)
    if task in ("reward", "ranked"):
        module = RewardModel(model, letters(), optimization=optimization)
        module.ensemble.heads[0].weight.data.copy_(score_weights())
        return module
    return DPO(model, letters(), objective=Sigmoid(beta=BETA), optimization=optimization)
