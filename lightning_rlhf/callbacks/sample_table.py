"""Samples of each validation, to a file and to loggers that show text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from lightning_rlhf.algorithms.online import Online
from lightning_rlhf.data.prompts import Text

COLUMNS = ("prompt", "completion", "score", "kl", "greedy", "greedy_score")
NAME = "val/samples"


class SampleTable(Callback):
    """Write what the policy answered to the validation prompts, with scores and KL.

    After each validation the rows of all ranks are gathered, in the data's order, and rank 0 writes them to
    ``samples/step-<global_step>.jsonl`` in the log folder; the first ones go, as a table, to TensorBoard (as text) and
    to Weights & Biases. A row holds the prompt, a completion at the training's temperature with its score and KL in
    nats, and a greedy completion with its score.

    Args:
        max_rows: Rows of the loggers' table; the file holds all.

    Raises:
        ValueError: If ``max_rows`` is less than 1; at the start, if the module is none that samples.
    """

    def __init__(self, max_rows: int = 100) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        self.max_rows = max_rows

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a module that does not sample."""
        if not isinstance(pl_module, Online):
            raise ValueError(
                f"SampleTable shows what a policy samples in validation, and {type(pl_module).__name__} samples "
                "nothing: leave it out, or see HeldOutKL"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather, write and log."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, Online)
        rows = gathered(pl_module.last_validation, trainer.world_size)
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"  # a collective of all ranks
        if not trainer.is_global_zero or not rows:
            return
        folder.mkdir(parents=True, exist_ok=True)
        step = trainer.global_step
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"step-{step}.jsonl").write_text("".join(lines))
        for logger in trainer.loggers:
            show(logger, rows[: self.max_rows], step)


def gathered(rows: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """The rows of all ranks by their number in the data, each once: two ranks may hold the same to have equal shares.

    Example:
        >>> gathered([{"row": 4}, {"row": 2}, {"row": 4}], 1)
        [{'row': 2}, {'row': 4}]
    """
    ranks: list[Any] = [rows]
    if dist.is_initialized() and world_size > 1:
        ranks = [None] * world_size
        dist.all_gather_object(ranks, rows)
    unique = {row["row"]: row for several in reversed(ranks) for row in several}
    return [unique[number] for number in sorted(unique)]


def show(logger: Logger, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Log a table where the logger has a way to show text; others are left alone."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(NAME, markdown(rows), step)
    elif isinstance(logger, WandbLogger):
        data = [[_cell(row[column]) for column in COLUMNS] for row in rows]
        logger.log_table(NAME, columns=list(COLUMNS), data=data, step=step)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""A table in Markdown, which TensorBoard shows.

    Example:
        >>> row = {"prompt": "a|b", "completion": "x\ny", "score": 0.5, "kl": 1.0, "greedy": "z", "greedy_score": 1.0}
        >>> print(markdown([row]))
        | prompt | completion | score | kl | greedy | greedy_score |
        |---|---|---|---|---|---|
        | a\|b | x<br>y | 0.500 | 1.000 | z | 1.000 |
    """
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = (_cell(row[column]) for column in COLUMNS)
        shown = (f"{c:.3f}" if isinstance(c, float) else c.replace("|", "\\|") for c in cells)
        lines.append(f"| {' | '.join(shown)} |".replace("\n", "<br>"))
    return "\n".join(lines)


def _cell(value: Text | float) -> str | float:
    if isinstance(value, list):
        return "\n".join(f"{message['role']}: {message['content']}" for message in value)
    return value
