"""The datamodule of prompts, for algorithms that sample the completions themselves."""

from typing import Any

from datasets import Dataset

from lightning_rlhf.data.base import GroupDataModule
from lightning_rlhf.data.prompt_batch import PromptCollator
from lightning_rlhf.data.prompt_only import PromptJob
from lightning_rlhf.data.tokenization import Limits
from lightning_rlhf.data.tokenized import Job, OnBadRow


class PromptDataModule(GroupDataModule):
    """Prompts, for algorithms that sample: ``prompt`` (text or messages), and columns for reward functions.

    Any data with a prompt will do: the completions of preferences or demonstrations are not learned from, and travel
    along like every other column.

    Args:
        train: A file (``.jsonl``, ``.jsonl.gz``, ``.json``, ``.csv``, ``.parquet``), a directory saved by
            ``datasets``, a Hub id, with ``:split`` after it to name a split, or a ``datasets.Dataset``.
        val: Validation data.
        test: Test data.
        predict: Data to predict on.
        tokenizer: An object or a path; by default that of the module being fitted.
        batch_size: Prompts in a batch, on each rank.
        max_tokens: Tokens of prompts in a batch, instead of ``batch_size``.
        max_length: Tokens of prompt + completion; a prompt that leaves no room for a completion is a bad row.
        max_prompt_length: Tokens of a prompt; cut from the left.
        on_bad_row: "error" stops at a row that cannot be used, "drop" leaves it out and counts it.
        length_grouped: Put prompts of similar length into a batch: generation pads them to the longest.
        drop_last: Leave out a last, smaller batch.
        num_workers: Processes that load batches.
        num_proc: Processes that tokenise.
        seed: Of the order of the training data.
        val_fraction: Share of the training data kept for validation where ``val`` is not given.
        columns: What columns of the data are to be called, such as ``{"question": "prompt"}``.
    """

    task = "prompt"
    collator = PromptCollator()

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

    def job(self, rows: Dataset, job: Job) -> Job:
        """Keep the columns that are handed to reward functions."""
        return PromptJob.of(rows, job)
