"""fit, validate, test and predict: LightningCLI with this package's classes."""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch import Tensor

# Imported so that their short names work in flags and in YAML.
from lightning_rlhf import data as _data  # noqa: F401
from lightning_rlhf import rewards as _rewards  # noqa: F401
from lightning_rlhf.algorithms.base import Algorithm
from lightning_rlhf.callbacks import ExactResume
from lightning_rlhf.cli.parser import ConfigParser
from lightning_rlhf.cli.run_facts import write_facts
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.data.packing import PackedBatch

QUIET = (
    # It is given arguments while sys.argv holds some. Here they are the same, and have to stay in sys.argv, by which
    # Lightning starts the other processes of a distributed run.
    "LightningCLI's args parameter",
    # A rollout's steps are all taken before the checkpoint after it, as they should be.
    "Using ModelCheckpoint with manual optimization",
    # Of no validation data, which need not be there.
    "Total length of `list` across ranks is zero",
    # What Lightning and torchdata call themselves.
    "'set_vital' is deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
"""Beginnings of warnings that no user can act upon."""


class PredictionWriter(BasePredictionWriter):
    """Write one JSON line a row of data: ``{"row": 3, "values": [-12.5, -14.0]}``, one value a completion.

    Of prompts, the completions that were sampled: ``{"row": 3, "prompt": "…", "completions": ["…"]}``. Each process
    writes ``predictions.jsonl`` (or ``predictions.<rank>.jsonl``) in the log folder.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file."""
        suffix = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.log_dir or trainer.default_root_dir) / f"predictions{suffix}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        print(f"predictions go to {path}")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Tensor | list[str],
        batch_indices: Sequence[int] | None,
        batch: PackedBatch | PromptBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the rows of a batch."""
        assert self._file is not None
        for line in predicted_rows(prediction, batch):
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def predicted_rows(
    prediction: Tensor | list[str], batch: PackedBatch | PromptBatch
) -> Iterator[dict[str, Any]]:
    """A line for each row of a batch: values of its completions, or the completions that were sampled for a prompt.

    Example:
        >>> list(predicted_rows(["x", "y"], PromptBatch(([5],), ("a",), ("a",), row_ids=(3,))))
        [{'row': 3, 'prompt': 'a', 'completions': ['x', 'y']}]
    """
    if isinstance(batch, PromptBatch):
        count = len(prediction) // len(batch)
        for i, (row, prompt) in enumerate(zip(batch.row_ids, batch.prompts, strict=True)):
            yield {"row": row, "prompt": prompt, "completions": prediction[i * count : (i + 1) * count]}
        return
    assert isinstance(prediction, Tensor)
    values = iter(prediction.tolist())
    for row, completions in zip(batch.row_ids, batch.completion_lengths, strict=True):
        yield {"row": row, "values": [next(values) for _ in completions]}


class SaveConfig(SaveConfigCallback):
    """Keep configuration, date and versions beside the logs; without a logger there is no folder to keep them in."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save them when a training begins."""
        if stage == "fit" and trainer.loggers:
            self.folder = trainer.log_dir  # asked on every rank: the first one tells the others
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save date and versions."""
        assert self.folder is not None
        write_facts(Path(self.folder))


class RLHFCLI(LightningCLI):
    """LightningCLI for this package's modules and datamodules, or subclasses of them.

    The configuration says what runs; a checkpoint given by ``ckpt_path`` restores its state and nothing else.

    Args:
        arguments: What follows the program's name; a trainer method first where ``run``.
        run: Run that method; else only build trainer, module and datamodule.
        command: The program's command that builds them.
    """

    def __init__(self, arguments: list[str], *, run: bool = True, command: str = "doctor") -> None:
        for beginning in QUIET:
            warnings.filterwarnings("ignore", message=beginning)
        super().__init__(
            Algorithm,
            L.LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [ExactResume(), PredictionWriter()]},
            seed_everything_default=0,
            parser_class=ConfigParser,
            parser_kwargs={"prog": "lightning-rlhf"} if run else {"prog": f"lightning-rlhf {command}"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=arguments,
            run=run,
            auto_configure_optimizers=False,
            # Modules save plain hyperparameters themselves: a checkpoint is the same, made here or in Python.
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Without a method to run, its arguments that recipes may hold are accepted all the same."""
        if not self._runs():
            parser.add_argument("--ckpt_path", type=str | None, default=None, help="Not used.")
            parser.add_argument("--weights_only", type=bool | None, default=None, help="Not used.")

    def _runs(self) -> bool:
        return "_subcommand_method_arguments" in vars(self)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone.

        LightningCLI would silently put the checkpoint's hyperparameters over it, its class included: a checkpoint
        of another algorithm would train that one, and a new learning rate would be ignored.
        """

    def before_instantiate_classes(self) -> None:
        """Load checkpoints with ``weights_only`` unless told otherwise."""
        if self.subcommand and self.config[self.subcommand].get("weights_only") is None:
            self.config[self.subcommand]["weights_only"] = True


def _trainer_command(name: str, arguments: list[str]) -> None:
    try:
        RLHFCLI([name, *arguments])
    except MisconfigurationException as error:
        hint = (
            "\nPPO clips by model.update.max_grad_norm and accumulates by model.update.micro_batch_size"
            if "manual optimization" in str(error)
            else ""
        )
        raise ValueError(f"{error}{hint}") from error


def fit(arguments: list[str]) -> None:
    """Train.

    Raises:
        DoesNotFitError: Where the GPU's memory is not enough, with what the training needs and what would help.
    """
    try:
        _trainer_command("fit", arguments)
    except torch.OutOfMemoryError as error:
        from lightning_rlhf.cli.memory import does_not_fit

        raise does_not_fit(error, arguments) from error


def validate(arguments: list[str]) -> None:
    """Evaluate on the validation set."""
    _trainer_command("validate", arguments)


def test(arguments: list[str]) -> None:
    """Evaluate on the test set."""
    _trainer_command("test", arguments)


def predict(arguments: list[str]) -> None:
    """Write predictions."""
    _trainer_command("predict", arguments)
