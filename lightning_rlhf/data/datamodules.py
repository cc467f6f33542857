"""LightningDataModules: one argument for the data, the tokenizer from the module that is fitted."""

from typing import Any

from datasets import Dataset

from lightning_rlhf.data.base import GroupDataModule
from lightning_rlhf.data.report import SplitReport
from lightning_rlhf.data.tokenization import Limits, LossOn
from lightning_rlhf.data.tokenized import OnBadRow
from lightning_rlhf.data.unpaired import check_labels, complete_unpaired


class SFTDataModule(GroupDataModule):
    """Demonstrations: ``prompt`` and ``completion``, ``messages``, ``conversations`` or ``text``.

    Args:
        train: A file (``.jsonl``, ``.jsonl.gz``, ``.json``, ``.csv``, ``.parquet``), a directory saved by
            ``datasets``, a Hub id, with ``:split`` after it to name a split, or a ``datasets.Dataset``.
        val: Validation data.
        test: Test data.
        predict: Data to predict on.
        tokenizer: An object or a path; by default that of the module being fitted.
        batch_size: Prompts with their completions in a batch, on each rank.
        max_tokens: Tokens in a batch, instead of ``batch_size``.
        max_length: Tokens of prompt + completion; completions are cut from the right.
        max_prompt_length: Tokens of a prompt; cut from the left.
        loss_on: "answers" (the assistant's turns of messages, the completion where there is a prompt, all of a text),
            "completion", "assistant" or "all".
        on_bad_row: "error" stops at a row that cannot be used, "drop" leaves it out and counts it.
        length_grouped: Put rows of similar length into a batch. Packed batches have no padding, so that this helps
            only the padded layout, and the balance between ranks.
        drop_last: Leave out a last, smaller batch.
        num_workers: Processes that load batches.
        num_proc: Processes that tokenise.
        seed: Of the order of the training data.
        val_fraction: Share of the training data kept for validation where ``val`` is not given.
        columns: What columns of the data are to be called, such as ``{"question": "prompt", "answer": "completion"}``.
    """

    task = "sft"

    def __init__(
        self,
        train: str | Dataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        tokenizer: str | Any | None = None,  # noqa: ANN401
        batch_size: int = 8,
        max_tokens: int | None = None,
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        loss_on: LossOn = "answers",
        on_bad_row: OnBadRow = "error",
        length_grouped: bool = False,
        drop_last: bool = False,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        val_fraction: float = 0.0,
        columns: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            {"train": train, "val": val, "test": test, "predict": predict},
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_tokens=max_tokens,
            limits=Limits(max_length, max_prompt_length),
            loss_on=loss_on,
            on_bad_row=on_bad_row,
            length_grouped=length_grouped,
            drop_last=drop_last,
            num_workers=num_workers,
            num_proc=num_proc,
            seed=seed,
            val_fraction=val_fraction,
            columns=columns,
        )


class PreferenceDataModule(GroupDataModule):
    """Pairs: ``prompt``, ``chosen`` and ``rejected``; without ``prompt`` it is what the two have in common.

    Or rankings, for a reward model: ``prompt`` and ``completions``, the best first, or with ``ranks`` (numbers, lower
    is better, ties allowed), by which completions are then sorted.

    Args:
        train: A file (``.jsonl``, ``.jsonl.gz``, ``.json``, ``.csv``, ``.parquet``), a directory saved by
            ``datasets``, a Hub id, with ``:split`` after it to name a split, or a ``datasets.Dataset``.
        val: Validation data.
        test: Test data.
        predict: Data to predict on.
        tokenizer: An object or a path; by default that of the module being fitted.
        batch_size: Prompts with their completions in a batch, on each rank.
        max_tokens: Tokens in a batch, each prompt counted once, instead of ``batch_size``.
        max_length: Tokens of prompt + completion; completions are cut from the right.
        max_prompt_length: Tokens of a prompt; cut from the left.
        on_bad_row: "error" stops at a row that cannot be used, "drop" leaves it out and counts it.
        length_grouped: Put rows of similar length into a batch. Packed batches have no padding, so that this helps
            only the padded layout, and the balance between ranks.
        drop_last: Leave out a last, smaller batch.
        num_workers: Processes that load batches.
        num_proc: Processes that tokenise.
        seed: Of the order of the training data.
        val_fraction: Share of the training data kept for validation where ``val`` is not given.
        columns: What columns of the data are to be called, such as ``{"question": "prompt", "answer": "completion"}``.
    """

    task = "preference"

    def __init__(
        self,
        train: str | Dataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        tokenizer: str | Any | None = None,  # noqa: ANN401
        batch_size: int = 8,
        max_tokens: int | None = None,
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        on_bad_row: OnBadRow = "error",
        length_grouped: bool = False,
        drop_last: bool = False,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        val_fraction: float = 0.0,
        columns: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            {"train": train, "val": val, "test": test, "predict": predict},
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_tokens=max_tokens,
            limits=Limits(max_length, max_prompt_length),
            loss_on="completion",
            on_bad_row=on_bad_row,
            length_grouped=length_grouped,
            drop_last=drop_last,
            num_workers=num_workers,
            num_proc=num_proc,
            seed=seed,
            val_fraction=val_fraction,
            columns=columns,
        )


class UnpairedDataModule(GroupDataModule):
    """Labelled answers, for KTO: ``prompt``, ``completion`` and ``label`` (true or false, 1 or 0).

    Pairs (``prompt``, ``chosen``, ``rejected``) become one desirable and one undesirable answer each. Each answer has a
    mismatched completion beside it, another prompt's, which estimates KTO's reference point: chosen once, by ``seed``,
    so that it is the same on all ranks and in every epoch, and exists in a batch of one. The predict split has none.

    Args:
        train: A file (``.jsonl``, ``.jsonl.gz``, ``.json``, ``.csv``, ``.parquet``), a directory saved by
            ``datasets``, a Hub id, with ``:split`` after it to name a split, or a ``datasets.Dataset``.
        val: Validation data.
        test: Test data.
        predict: Data to predict on.
        tokenizer: An object or a path; by default that of the module being fitted.
        batch_size: Prompts with their completions in a batch, on each rank.
        max_tokens: Tokens in a batch, each prompt counted once, instead of ``batch_size``.
        max_length: Tokens of prompt + completion; completions are cut from the right.
        max_prompt_length: Tokens of a prompt; cut from the left.
        on_bad_row: "error" stops at a row that cannot be used, "drop" leaves it out and counts it.
        length_grouped: Put rows of similar length into a batch. Packed batches have no padding, so that this helps
            only the padded layout, and the balance between ranks.
        drop_last: Leave out a last, smaller batch.
        num_workers: Processes that load batches.
        num_proc: Processes that tokenise.
        seed: Of the order of the training data, and of the choice of mismatched completions.
        val_fraction: Share of the training data kept for validation where ``val`` is not given.
        mismatched: False leaves the mismatched completions out: ``loss_type: apo_zero_unpaired`` needs none.
        columns: What columns of the data are to be called, such as ``{"question": "prompt", "answer": "completion"}``.
    """

    task = "unpaired"

    def __init__(
        self,
        train: str | Dataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        tokenizer: str | Any | None = None,  # noqa: ANN401
        batch_size: int = 8,
        max_tokens: int | None = None,
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        on_bad_row: OnBadRow = "error",
        length_grouped: bool = False,
        drop_last: bool = False,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        val_fraction: float = 0.0,
        mismatched: bool = True,
        columns: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            {"train": train, "val": val, "test": test, "predict": predict},
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_tokens=max_tokens,
            limits=Limits(max_length, max_prompt_length),
            loss_on="completion",
            on_bad_row=on_bad_row,
            length_grouped=length_grouped,
            drop_last=drop_last,
            num_workers=num_workers,
            num_proc=num_proc,
            seed=seed,
            val_fraction=val_fraction,
            columns=columns,
        )
        self.mismatched = mismatched

    def complete(self, rows: Dataset, report: SplitReport, split: str) -> tuple[Dataset, SplitReport]:
        """Check the labels to be trained on, and add mismatched completions."""
        if split == "train":
            check_labels(rows, report.name)
        return complete_unpaired(
            rows,
            report,
            max_length=self.limits.max_length,
            mismatched=self.mismatched and split != "predict",
            seed=self.seed,
        )
