"""Optimizer steps of a rollout, and what the Trainer counts in them: the end of a run, and checkpoints."""

import warnings

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.algorithms.update import Update


def total_steps(trainer: L.Trainer, steps: int) -> float:
    """Optimizer steps of a whole run; infinite where the Trainer has no end.

    Args:
        trainer: With its data.
        steps: Of a rollout.
    """
    total = float("inf") if trainer.max_steps == -1 else float(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        total = min(total, trainer.num_training_batches * trainer.max_epochs * steps)
    return total


def require_whole_rollouts(trainer: L.Trainer, steps: int, *, varies: bool) -> None:
    """Say where the Trainer counts in other units than rollouts, between which alone it can stop and save.

    A ``max_steps`` that is no multiple gets a warning, since the last rollout is finished anyway.

    Args:
        trainer: About to train.
        steps: Of a rollout; where that varies, of the shortest one.
        varies: Whether a rollout may take several times as many.

    Raises:
        ValueError: If a ``ModelCheckpoint`` would save less often than ``every_n_train_steps`` says.
    """
    for callback in trainer.checkpoint_callbacks:
        every = callback._every_n_train_steps if isinstance(callback, ModelCheckpoint) else 0
        if every and steps % every and (varies or every % steps):
            wanted = "a number that varies" if varies else f"{steps} of them"
            raise ValueError(
                f"ModelCheckpoint has every_n_train_steps {every}: that counts optimizer steps, a rollout takes "
                f"{wanted}, and a checkpoint falls between rollouts, so that most would be left out. Give "
                + ("1" if varies else f"a multiple of {steps}, or 1")
                + " (1 saves after every rollout), or every_n_epochs or train_time_interval"
            )
    whole = varies or trainer.fast_dev_run  # type: ignore[attr-defined]
    if trainer.max_steps > 0 and trainer.max_steps % steps and not whole:
        warnings.warn(
            f"max_steps {trainer.max_steps} is no multiple of the {steps} optimizer steps of a rollout: the run ends "
            f"with a whole rollout, after {-(-trainer.max_steps // steps) * steps} steps",
            stacklevel=2,
        )


def passes(size: int, update: Update, *, sharded: bool) -> list[int]:
    """What ranks have to do in step with each other in a pass over a rollout of so many completions.

    Returns:
        A number a minibatch: of its forwards where weights or gradients are sharded, since each waits for all ranks.

    Example:
        >>> passes(7, Update(minibatch_size=4, micro_batch_size=2), sharded=True)
        [2, 2]
        >>> passes(7, Update(minibatch_size=4), sharded=False)
        [1, 1]
    """
    sizes = [min(update.minibatch_size, size - start) for start in range(0, size, update.minibatch_size)]
    micro = update.micro_batch_size or update.minibatch_size
    return [-(-one // micro) if sharded else 1 for one in sizes]


def require_equal_passes(trainer: L.Trainer, size: int, update: Update, *, sharded: bool) -> None:
    """Refuse a rollout that would leave one rank waiting for another for ever.

    Args:
        trainer: Of the run.
        size: Completions on this rank.
        update: How they are learned from.
        sharded: Whether weights or gradients are spread over ranks.

    Raises:
        ValueError: If ranks would take different numbers of optimizer steps or, where weights are sharded, forwards.
    """
    if trainer.world_size == 1:
        return
    if sharded and update.micro_batch_tokens is not None:
        raise ValueError(
            f"update.micro_batch_tokens is {update.micro_batch_tokens}: by it every rank makes another number of "
            "forwards, and under FSDP and DeepSpeed's stage 2 each waits for all ranks. Set it to null, and "
            "update.micro_batch_size"
        )
    device = trainer.strategy.root_device
    sizes = torch.tensor([size, -size], device=device)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    most, least = int(sizes[0]), -int(sizes[1])
    if passes(most, update, sharded=sharded) != passes(least, update, sharded=sharded):
        raise ValueError(
            f"a rank has {most} completions in this rollout and another {least}, so that they would wait for each "
            "other: set the data's drop_last: true, so that every rollout has as many"
        )
