"""What the datamodules share: loading, tokenising and batching by split."""

import os
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_rlhf.data.collate import PackCollator
from lightning_rlhf.data.formats import Task, recognise
from lightning_rlhf.data.prompt_batch import PromptCollator
from lightning_rlhf.data.report import SplitReport
from lightning_rlhf.data.sampler import GroupBatchSampler
from lightning_rlhf.data.sources import describe, load_rows, rename_columns
from lightning_rlhf.data.tokenization import Encoder, Limits, LossOn
from lightning_rlhf.data.tokenized import Job, OnBadRow, fingerprint, tokenize

SPLITS = ("train", "val", "test", "predict")
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
Loader = DataLoader[Any] | list[Any]


class GroupDataModule(L.LightningDataModule):
    """What the datamodules share; see :class:`SFTDataModule` for the arguments.

    Attributes:
        datasets: Tokenised rows by split, after ``setup``.
        report: What became of the rows, by split; printed once.
    """

    task: Task = "sft"
    collator: PackCollator | PromptCollator = PackCollator()

    def __init__(
        self,
        sources: dict[str, Any],
        *,
        tokenizer: Any,  # noqa: ANN401
        batch_size: int,
        max_tokens: int | None,
        limits: Limits,
        loss_on: LossOn,
        on_bad_row: OnBadRow,
        length_grouped: bool,
        drop_last: bool,
        num_workers: int,
        num_proc: int | None,
        seed: int,
        val_fraction: float,
        columns: dict[str, str] | None,
    ) -> None:
        super().__init__()
        if on_bad_row not in ("error", "drop"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}; it must be 'error' or 'drop'")
        if not 0 <= val_fraction < 1 or (val_fraction and sources["val"] is not None):
            raise ValueError(f"val_fraction ({val_fraction}) must be in [0, 1), and 0 where val is given")
        self.sources = {split: source for split, source in sources.items() if source is not None}
        self.batch_size, self.max_tokens, self.length_grouped = batch_size, max_tokens, length_grouped
        self.drop_last, self.num_workers, self.num_proc, self.seed = drop_last, num_workers, num_proc, seed
        self.limits, self.loss_on, self.on_bad_row, self.val_fraction = (
            limits,
            loss_on,
            on_bad_row,
            val_fraction,
        )
        self.columns = columns or {}
        self.datasets: dict[str, Dataset] = {}
        self.report: dict[str, SplitReport] = {}
        self._tokenizer = tokenizer
        self._fingerprints: dict[str, str] = {}

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401
        """The tokenizer given, loaded where it is a path, else that of the module being fitted.

        Raises:
            ValueError: If there is neither.
        """
        if isinstance(self._tokenizer, str | os.PathLike):
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer)
        if self._tokenizer is not None:
            return self._tokenizer
        module = None if self.trainer is None else self.trainer.lightning_module
        found = getattr(module, "tokenizer", None)
        if found is None:
            raise ValueError(
                f"{type(self).__name__} has no tokenizer: give it one (tokenizer=…, an object or a path), or fit a "
                "module that has one"
            )
        return found

    def prepare_data(self) -> None:
        """Load and tokenise in one process of each machine, for the others to find in the cache."""
        self.setup(
            None if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value
        )

    def setup(self, stage: str | None = None) -> None:
        """Tokenise the splits that a stage needs, once.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"``, ``"predict"`` or None for all.

        Raises:
            ValueError: If there is no data for the stage, or rows are bad.
        """
        wanted = STAGES.get(stage or "", SPLITS)
        if stage in STAGES and self._source(wanted[0]) is None:
            raise ValueError(
                f"{type(self).__name__} was given no {wanted[0]} data, which trainer.{stage} needs"
            )
        for split in wanted:
            if split not in self.datasets and self._source(split) is not None:
                self.datasets[split], self.report[split] = self._tokenise(split)
                rank_zero_info(f"{split}: {self.report[split]}")

    def _source(self, split: str) -> Any:  # noqa: ANN401
        return self.sources.get("train" if split == "val" and self.val_fraction else split)

    def _tokenise(self, split: str) -> tuple[Dataset, SplitReport]:
        source = self._source(split)
        name = describe(source)
        rows = load_rows(source, "train" if self.val_fraction and split == "val" else split)
        rows = rename_columns(rows, self.columns, name)
        columns = recognise(rows.column_names, self.task, name)
        chosen = self._share(split, len(rows))
        encoder = Encoder(self.tokenizer, self.limits, self.loss_on)
        job = self.job(rows, Job(self.task, encoder, columns, self.on_bad_row, name, chosen))
        made = tokenize(rows if chosen is None else rows.select(chosen), job, num_proc=self.num_proc)
        return self.complete(*made, split)

    def job(self, rows: Dataset, job: Job) -> Job:
        """What a datamodule does to each row instead; nothing else by default."""
        return job

    def complete(self, rows: Dataset, report: SplitReport, split: str) -> tuple[Dataset, SplitReport]:
        """What a datamodule does with the tokenised rows of a split; nothing by default."""
        return rows, report

    def _share(self, split: str, count: int) -> Sequence[int] | None:
        """Which rows of the training data a split has, where a fraction of them is kept for validation."""
        if not self.val_fraction or split not in ("train", "val"):
            return None
        held_out = round(count * self.val_fraction)
        if not 0 < held_out < count:
            raise ValueError(
                f"val_fraction {self.val_fraction} of {count} rows leaves nothing to train or validate on"
            )
        order = np.random.default_rng(self.seed).permutation(count)
        return sorted((order[:held_out] if split == "val" else order[held_out:]).tolist())

    def fingerprint(self, split: str) -> str:
        """A hash of a split's data, tokenizer, template and limits: of the token ids and masks they lead to."""
        if split not in self._fingerprints:
            self._fingerprints[split] = fingerprint(self.datasets[split])
        return self._fingerprints[split]

    def _sampler(self, split: str, batch_size: int | None = None, **how: Any) -> GroupBatchSampler:  # noqa: ANN401
        lengths = self.datasets[split].with_format("numpy")["num_tokens"][:]
        max_tokens = self.max_tokens if batch_size is None else None
        return GroupBatchSampler(
            lengths, batch_size=batch_size or self.batch_size, max_tokens=max_tokens, **how
        )

    def evaluation_loader(self, split: str, batch_size: int | None = None) -> "DataLoader[Any]":
        """Every row of a split once and in order, the same in every process.

        Args:
            split: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.
            batch_size: Groups in a batch, instead of the datamodule's ``batch_size`` or ``max_tokens``.

        Returns:
            The loader; row i of ``datasets[split]`` has ``row_ids`` i.
        """
        sampler = self._sampler(split, batch_size, shuffle=False)
        return DataLoader(
            self.datasets[split],
            batch_size=None,
            sampler=sampler,
            collate_fn=self.collator,
            generator=self._generator(),
        )

    def _generator(self) -> torch.Generator:
        """Where a loader draws the seed of each of its iterators from.

        Drawn from the global state, a run resumed between two epochs, or between a checkpoint and the validation
        after it, would have other dropout masks than one that was never interrupted.
        """
        return torch.Generator().manual_seed(self.seed)

    def _loader(self, split: str, *, training: bool = False) -> Loader:
        if split not in self.datasets:
            return []
        trainer = self.trainer
        common: dict[str, Any] = {
            "collate_fn": self.collator,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "generator": self._generator(),
        }
        if split == "predict" or (split in STAGES["fit"] and getattr(trainer, "overfit_batches", False)):
            # Here Lightning puts its own samplers in: to know a prediction's row, and to repeat the same batches, of
            # validation as well.
            return DataLoader(self.datasets[split], batch_size=self.batch_size, **common)
        ranks = None if trainer is None else trainer.distributed_sampler_kwargs
        sampler = self._sampler(
            split,
            shuffle=training,
            length_grouped=training and self.length_grouped,
            drop_last=training and self.drop_last,
            seed=self.seed,
            **(ranks or {}),
        )
        if training and trainer is not None:
            # Lightning says which epoch it is only after workers have begun to fetch the first batches of it.
            progress: Any = trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(progress.processed)
            limit = trainer.limit_train_batches
            sampler.used = limit if isinstance(limit, int) else int(len(sampler) * (limit or 1.0))
        return StatefulDataLoader(self.datasets[split], batch_size=None, sampler=sampler, **common)

    def train_dataloader(self) -> Loader:
        """Shuffled batches of this rank; the position in them is part of a checkpoint."""
        return self._loader("train", training=True)

    def val_dataloader(self) -> Loader:
        """Validation batches, in order."""
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        """Test batches, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> Loader:
        """Batches of ``batch_size`` groups to predict on, in order."""
        return self._loader("predict")
