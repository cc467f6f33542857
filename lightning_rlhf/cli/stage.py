"""What a stage of a pipeline leaves in its folder: checkpoints, the seconds of training, and what was logged."""

import csv
import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.models.export import read_checkpoint

END = "end.ckpt"


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
        trainer.save_checkpoint(Path(str(self.dirpath)) / END, weights_only=False)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that can be read: a kill while writing may have broken the last one."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            read_checkpoint(path, weights=False)
        except ValueError as error:
            print(f"left out: {error}")
        else:
            return path
    return None


def training_seconds(checkpoint: Path) -> float:
    """Seconds of the training that led to a checkpoint, as Lightning's ``Timer`` kept them.

    Of an interrupted training those up to the checkpoint it went on from, and those after.
    """
    elapsed: dict[str, Any] = read_checkpoint(checkpoint, weights=False)["callbacks"]["Timer"]["time_elapsed"]
    return float(elapsed["train"])


def logged(folder: Path, name: str) -> dict[str, list[Any]]:
    """A value by step, as Lightning's ``CSVLogger`` wrote it.

    Args:
        folder: Holds ``version_0`` and, where the training was interrupted, further ones. Steps that a later one took
            again count as it logged them.
        name: Of the value.

    Returns:
        Its ``steps`` and ``values``.
    """
    found: dict[int, float] = {}
    versions = [path.parent for path in folder.glob("version_*/metrics.csv")]
    for version in sorted(versions, key=lambda path: int(re.sub(r"\D", "", path.name))):
        with (version / "metrics.csv").open() as file:
            rows = [(int(row["step"]), row.get(name)) for row in csv.DictReader(file)]
        found |= {step: float(value) for step, value in rows if value}
    steps = sorted(found)
    return {"steps": steps, "values": [found[step] for step in steps]}
