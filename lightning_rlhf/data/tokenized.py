"""Tokenised data sets: rows of token ids, made once, with a report of what was cut and dropped."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value

from lightning_rlhf.data.formats import Example, Task, read_example, recognise, unpair
from lightning_rlhf.data.report import BadRow, SplitReport
from lightning_rlhf.data.tokenization import Encoder, Limits, LossOn, Tokens

OnBadRow = Literal["error", "drop"]
VERSION = 1  # of what is written to the cache: raise it when the same settings give other ids

COLUMNS = {
    "prompt_ids": List(Value("int32")),
    "completion_ids": List(List(Value("int32"))),
    "completion_masks": List(List(Value("bool"))),
    "num_tokens": Value("int32"),
    "prompt_cut": Value("bool"),
    "completions_cut": Value("int32"),
    "source_row": Value("int64"),
    "problem": Value("string"),
}
DROPPED = dict.fromkeys(COLUMNS) | {"num_tokens": 0, "prompt_cut": False, "completions_cut": 0}


def tokenize_sft(
    rows: Dataset,
    tokenizer: Any,  # noqa: ANN401
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    loss_on: LossOn = "answers",
    on_bad_row: OnBadRow = "error",
    name: str = "the Dataset",
    num_proc: int | None = None,
) -> tuple[Dataset, SplitReport]:
    """Tokenise demonstrations: language modelling or prompt–completion rows.

    Args:
        rows: With the columns of a format; others are ignored.
        tokenizer: Any tokenizer of Transformers.
        max_length: Tokens of prompt + completion at most.
        max_prompt_length: Tokens of a prompt at most.
        loss_on: See :class:`~lightning_rlhf.data.tokenization.Encoder`.
        on_bad_row: Stop at the first row that cannot be used, or drop such rows and count them.
        name: Of the data, for errors and the report.
        num_proc: Processes to tokenise with.

    Returns:
        A data set for :class:`~lightning_rlhf.data.collate.PackCollator`, and the report.

    Raises:
        ValueError: If columns are missing, a row is bad, or none is left; names data, row, column and remedy.
    """
    limits = Limits(max_length, max_prompt_length)
    job = Job(
        "sft",
        Encoder(tokenizer, limits, loss_on),
        recognise(rows.column_names, "sft", name),
        on_bad_row,
        name,
    )
    return tokenize(rows, job, num_proc=num_proc)


def tokenize_preference(
    rows: Dataset,
    tokenizer: Any,  # noqa: ANN401
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    on_bad_row: OnBadRow = "error",
    name: str = "the Dataset",
    num_proc: int | None = None,
) -> tuple[Dataset, SplitReport]:
    """Tokenise preferences: groups of two completions, chosen before rejected, or of several, the best first.

    Args:
        rows: With the columns of a format; others are ignored.
        tokenizer: Any tokenizer of Transformers.
        max_length: Tokens of prompt + completion at most.
        max_prompt_length: Tokens of a prompt at most.
        on_bad_row: Stop at the first row that cannot be used, or drop such rows and count them.
        name: Of the data, for errors and the report.
        num_proc: Processes to tokenise with.

    Returns:
        A data set for :class:`~lightning_rlhf.data.collate.PackCollator`, and the report.

    Raises:
        ValueError: If columns are missing, a row is bad, or none is left; names data, row, column and remedy.
    """
    columns = recognise(rows.column_names, "preference", name)
    encoder = Encoder(tokenizer, Limits(max_length, max_prompt_length))
    return tokenize(rows, Job("preference", encoder, columns, on_bad_row, name), num_proc=num_proc)


@dataclass(frozen=True)
class Job:
    """What is done to each batch of rows.

    Attributes:
        task: Which formats.
        encoder: Makes token ids.
        columns: Of the format.
        on_bad_row: Raise or mark.
        name: Of the data.
        source_rows: Where the rows stand in the source, if that is not their index.
    """

    task: Task
    encoder: Encoder
    columns: tuple[str, ...]
    on_bad_row: OnBadRow
    name: str
    source_rows: Sequence[int] | None = None

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Columns of token ids."""
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        read = [self._read(row) for row in rows]
        self.encoder.prepare(example for found in read if not isinstance(found, BadRow) for example in found)
        extras = dict.fromkeys(self.extras(names))
        records = [
            extras | record
            for found, index in zip(read, indices, strict=True)
            for record in self._records(found, index)
        ]
        self.encoder.prepare([])
        return {column: [record[column] for record in records] for column in records[0]}

    def _read(self, row: Mapping[str, Any]) -> tuple[Example, ...] | BadRow:
        try:
            example = read_example(row, self.columns)
        except BadRow as problem:
            return problem
        return unpair(example) if self.task == "unpaired" else (example,)

    def _records(self, examples: tuple[Example, ...] | BadRow, index: int) -> list[dict[str, Any]]:
        at = index if self.source_rows is None else int(self.source_rows[index])
        try:
            if isinstance(examples, BadRow):
                raise examples
            return [self._record(example, at) for example in examples]
        except BadRow as problem:
            if self.on_bad_row == "error":
                raise ValueError(
                    f"{self.name}, row {at + 1}: {problem.detail}. Correct or delete the row, or set "
                    "on_bad_row='drop' to leave such rows out and count them"
                ) from None
            return [{**DROPPED, "source_row": at, "problem": problem.reason}]

    def _record(self, example: Example, at: int) -> dict[str, Any]:
        tokens = self.encoder(example)
        ranks = {} if tokens.ranks is None else {"ranks": list(tokens.ranks)}
        return {**self._row(tokens, at), **tokens.extras, **ranks}

    def _row(self, tokens: Tokens, at: int) -> dict[str, Any]:
        return {**_columns(tokens), "source_row": at, "problem": ""}

    def extras(self, columns: Iterable[str]) -> dict[str, Any]:
        """Columns of numbers that travel along, and their types."""
        if "completions" in self.columns:
            return {"ranks": List(Value("float64"))}
        if self.task == "unpaired":
            return {"label": Value("float64")}
        return {"margin": Value("float64")} if "chosen" in self.columns and "margin" in columns else {}

    def settings(self) -> list[str]:
        """All that decides what comes out, apart from the rows, as text."""
        encoder = self.encoder
        source = None if self.source_rows is None else np.asarray(self.source_rows).tobytes()
        parts = [VERSION, self.task, self.columns, self.on_bad_row, encoder.limits, encoder.loss_on]
        return [*map(repr, parts), _describe(encoder.tokenizer), hashlib.sha256(source or b"").hexdigest()]


def _columns(tokens: Tokens) -> dict[str, Any]:
    return {
        "prompt_ids": tokens.prompt,
        "completion_ids": tokens.completions,
        "completion_masks": tokens.masks,
        "num_tokens": len(tokens.prompt) + sum(map(len, tokens.completions)),
        "prompt_cut": tokens.prompt_cut,
        "completions_cut": tokens.completions_cut,
    }


def _describe(tokenizer: Any) -> str:  # noqa: ANN401
    """Everything about a tokenizer that decides ids."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return json.dumps([backend, special, tokenizer.chat_template, tokenizer("A b")["input_ids"]], default=str)


def tokenize(rows: Dataset, job: Job, *, num_proc: int | None = None) -> tuple[Dataset, SplitReport]:
    """Run a job over all rows, with a progress bar; cached on disk where the rows come from disk.

    Args:
        rows: Any.
        job: What is done to them.
        num_proc: Processes to do it with.

    Returns:
        The rows that are left, numbered anew in the column ``row_id``; ``source_row`` is where they came from. And
        the report.

    Raises:
        ValueError: If a row is bad, or all were dropped.
    """
    digest = hashlib.sha256("\0".join([rows._fingerprint, *job.settings()]).encode()).hexdigest()[:32]
    features = Features(COLUMNS | job.extras(rows.column_names))
    cache = None
    if rows.cache_files:
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "lightning_rlhf"
        folder.mkdir(parents=True, exist_ok=True)
        cache = str(folder / f"{digest}.arrow")
    tokenised = rows.map(
        job,
        with_indices=True,
        batched=True,
        batch_size=500,
        remove_columns=rows.column_names,
        features=features,
        num_proc=num_proc,
        cache_file_name=cache,
        new_fingerprint=digest,
        desc=f"Tokenising {job.name}",
    )
    counts = tokenised.select_columns(["num_tokens", "prompt_cut", "completions_cut", "problem"])
    values = counts.with_format("numpy")[:]
    problems = Counter(str(problem) for problem in values["problem"] if problem)
    notes = (
        () if job.encoder.eos is not None else ("the tokenizer has no EOS token: completions are not closed",)
    )
    report = SplitReport(
        job.name,
        len(rows),
        dict(problems),
        int(values["prompt_cut"].sum()),
        int(values["completions_cut"].sum()),
        int(values["num_tokens"].sum()),
        notes,
    )
    if sum(problems.values()) == len(rows):
        raise ValueError(f"{job.name}: every row was dropped: {report}")
    if problems:
        tokenised = tokenised.select(np.flatnonzero(values["problem"] == ""))
    kept = tokenised.remove_columns(["problem", "prompt_cut", "completions_cut"])
    return kept.add_column("row_id", np.arange(len(kept)).tolist()), report


def fingerprint(rows: Dataset) -> str:
    """A hash of the token ids and masks of a tokenised data set: of data, tokenizer, template and limits at once.

    Args:
        rows: What :func:`tokenize` returned.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    columns = rows.select_columns(["prompt_ids", "completion_ids", "completion_masks"]).with_format("arrow")
    for table in columns.iter(batch_size=10_000):
        for name in table.column_names:
            values = table.column(name).combine_chunks()
            while str(values.type).startswith(("list", "large_list")):
                lengths = values.value_lengths().fill_null(-1)
                digest.update(np.ascontiguousarray(lengths.to_numpy(zero_copy_only=False)).tobytes())
                values = values.flatten()
            digest.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).tobytes())
    return digest.hexdigest()
