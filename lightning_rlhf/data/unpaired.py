"""Unpaired preferences: labelled answers, each with a mismatched completion beside it."""

from dataclasses import replace
from typing import Any

from datasets import Dataset

from lightning_rlhf.data.formats import recognise
from lightning_rlhf.data.mismatch import with_mismatched
from lightning_rlhf.data.report import SplitReport
from lightning_rlhf.data.tokenization import Encoder, Limits
from lightning_rlhf.data.tokenized import Job, OnBadRow, tokenize


def tokenize_unpaired(
    rows: Dataset,
    tokenizer: Any,  # noqa: ANN401
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    on_bad_row: OnBadRow = "error",
    name: str = "the Dataset",
    num_proc: int | None = None,
    mismatched: bool = True,
    seed: int = 0,
) -> tuple[Dataset, SplitReport]:
    """Tokenise labelled answers, or pairs as one desirable and one undesirable answer.

    Each becomes a group of two completions: the labelled one, and a mismatched one, which belongs to another prompt and
    estimates KTO's reference point.

    Args:
        rows: With the columns of a format; others are ignored.
        tokenizer: Any tokenizer of Transformers.
        max_length: Tokens of prompt + completion at most, for the mismatched completion too.
        max_prompt_length: Tokens of a prompt at most.
        on_bad_row: Stop at the first row that cannot be used, or drop such rows and count them.
        name: Of the data, for errors and the report.
        num_proc: Processes to tokenise with.
        mismatched: False leaves the mismatched completions out, for losses without a reference point.
        seed: Of the choice of mismatched completions.

    Returns:
        A data set for :class:`~lightning_rlhf.data.collate.PackCollator`, and the report.

    Raises:
        ValueError: If columns are missing, a row is bad, or none is left; if all labels are the same; or if a row has
            no mismatched completion.
    """
    columns = recognise(rows.column_names, "unpaired", name)
    limits = Limits(max_length, max_prompt_length)
    job = Job("unpaired", Encoder(tokenizer, limits), columns, on_bad_row, name)
    tokenised, report = tokenize(rows, job, num_proc=num_proc)
    check_labels(tokenised, name)
    return complete_unpaired(tokenised, report, max_length=max_length, mismatched=mismatched, seed=seed)


def check_labels(rows: Dataset, name: str) -> None:
    """Refuse labels of one kind.

    Raises:
        ValueError: If all are desirable, or none is.
    """
    count, desirable = len(rows), int(sum(rows["label"]))
    if desirable in (0, count):
        raise ValueError(
            f"{name}: {desirable} desirable and {count - desirable} undesirable answers; the labels must be of both "
            "kinds: for desirable answers alone use SFT"
        )


def complete_unpaired(
    rows: Dataset, report: SplitReport, *, max_length: int | None, mismatched: bool, seed: int
) -> tuple[Dataset, SplitReport]:
    """Put a mismatched completion beside each labelled one, and the numbers of labels into the report."""
    count, desirable = len(rows), int(sum(rows["label"]))
    note = f"{desirable:,} desirable and {count - desirable:,} undesirable answers"
    if mismatched:
        try:
            rows = with_mismatched(rows, max_length=max_length, seed=seed)
        except ValueError as error:
            raise ValueError(f"{report.name}: {error}") from None
    tokens = int(rows.with_format("numpy")["num_tokens"][:].sum())
    return rows, replace(report, notes=(*report.notes, note), tokens=tokens)
