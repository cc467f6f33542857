"""Optimizer steps of a rollout, and what the Trainer counts in them: the end of a run, and checkpoints."""

import warnings

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


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
