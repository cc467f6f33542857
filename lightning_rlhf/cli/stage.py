"""One training of the quickstart or of a pipeline: resumable, and finished only when its model directory is there."""

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from lightning_rlhf.callbacks import ExactResume
from lightning_rlhf.models.export import read_checkpoint

LOG_EVERY = 10
END = "end.ckpt"


class Curve(Callback):
    """Keep a logged value by step, and the seconds of training; both go on after resuming.

    Args:
        name: Of the logged value.
        every: Optimizer steps between logs.
    """

    def __init__(self, name: str, every: int) -> None:
        self.name = name
        self.every = every
        self.steps: list[int] = []
        self.values: list[float] = []
        self.seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Note what the module logged after the batch before, which is after a callback's own turn."""
        self._note(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the last value, and stop the clock."""
        self._note(trainer)
        self._tick()

    def _note(self, trainer: L.Trainer) -> None:
        value, step = trainer.callback_metrics.get(self.name), trainer.global_step
        fresh = step % self.every == 0 and (not self.steps or self.steps[-1] < step)
        if value is not None and fresh:
            self.steps.append(step)
            self.values.append(float(value))

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or a report."""
        if self._since:
            self._tick()
        return {"steps": list(self.steps), "values": list(self.values), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.steps, self.values = list(state_dict["steps"]), list(state_dict["values"])
        self.seconds = state_dict["seconds"]


class StageCheckpoint(ModelCheckpoint):
    """The newest checkpoint of a stage, every so many optimizer steps, and ``end.ckpt`` when it is finished.

    A class of its own, since Lightning allows no two of one class and frequency, and recipes have theirs.

    Args:
        dirpath: Where they are kept.
        every_n_train_steps: Optimizer steps between them.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int) -> None:
        super().__init__(dirpath, every_n_train_steps=every_n_train_steps)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end; an interrupted training does not come here."""
        trainer.save_checkpoint(Path(str(self.dirpath)) / END)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that can be read: a kill while writing may have broken the last one."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            read_checkpoint(path)
        except ValueError as error:
            print(f"left out: {error}")
        else:
            return path
    return None


def train(
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    folder: Path,
    *,
    metric: str,
    max_epochs: int,
    save_every: int,
    gradient_clip_val: float,
) -> Curve:
    """Fit a module with a stock Trainer, from the last checkpoint in ``folder`` where there is one.

    Args:
        module: What to train.
        datamodule: On what.
        folder: Gets ``checkpoints/`` and ``logs/``.
        metric: The logged value whose curve is kept.
        max_epochs: Passes over the data.
        save_every: Optimizer steps between checkpoints.
        gradient_clip_val: Largest norm of a step's gradient.

    Returns:
        The curve and the seconds.

    Raises:
        KeyboardInterrupt: If it was interrupted.
    """
    checkpoints = folder / "checkpoints"
    resume = last_checkpoint(checkpoints)
    if resume is not None:
        print(f"continuing from {resume}")
    curve = Curve(metric, every=LOG_EVERY)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        gradient_clip_val=gradient_clip_val,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="logs"),
        callbacks=[
            ModelCheckpoint(checkpoints, every_n_train_steps=save_every, save_top_k=1, save_last=True),
            ExactResume(),
            TQDMProgressBar(refresh_rate=10),
            curve,
        ],
        log_every_n_steps=LOG_EVERY,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return curve
