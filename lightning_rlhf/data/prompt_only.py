"""Prompts without completions, tokenised; the other columns travel along for reward functions."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, Value

from lightning_rlhf.data.formats import Example, read_example, recognise
from lightning_rlhf.data.report import BadRow, SplitReport
from lightning_rlhf.data.tokenization import Encoder, Limits
from lightning_rlhf.data.tokenized import Job, OnBadRow, tokenize

ANSWERS = ("completion", "chosen", "rejected", "completions")


def tokenize_prompts(
    rows: Dataset,
    tokenizer: Any,  # noqa: ANN401
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    on_bad_row: OnBadRow = "error",
    name: str = "the Dataset",
    num_proc: int | None = None,
) -> tuple[Dataset, SplitReport]:
    """Tokenise prompts; the completions that rows may have are not used.

    Args:
        rows: With a column ``prompt``, or pairs that share one; other columns are kept as they are.
        tokenizer: Any tokenizer of Transformers.
        max_length: Tokens of prompt + completion; a prompt must leave room for at least one of the completion.
        max_prompt_length: Tokens of a prompt at most; cut from the left.
        on_bad_row: Stop at the first row that cannot be used, or drop such rows and count them.
        name: Of the data, for errors and the report.
        num_proc: Processes to tokenise with.

    Returns:
        A data set for :class:`~lightning_rlhf.data.prompt_batch.PromptCollator`, and the report.

    Raises:
        ValueError: If columns are missing, a row is bad, or none is left; names data, row, column and remedy.
    """
    columns = recognise(rows.column_names, "prompt", name)
    encoder = Encoder(tokenizer, Limits(max_length, max_prompt_length))
    job = PromptJob.of(rows, Job("prompt", encoder, columns, on_bad_row, name))
    return tokenize(rows, job, num_proc=num_proc)


def read_prompt(row: Mapping[str, Any], columns: tuple[str, ...]) -> Example:
    """Check the prompt of one row.

    Args:
        row: Its values by column.
        columns: ``("prompt",)``, or those of pairs that share their prompt.

    Returns:
        An example without completions.

    Raises:
        BadRow: If the prompt is missing, of a wrong type, or a conversation without messages.

    Example:
        >>> read_prompt({"prompt": "Sky?", "chosen": " blue"}, ("prompt",)).prompt
        'Sky?'
        >>> read_prompt({"chosen": "Sky? It is blue", "rejected": "Sky? It is black"}, ("chosen", "rejected")).prompt
        'Sky? It is'
    """
    if "prompt" in columns:
        # A text beside answers that are messages is the user's turn, as when those answers are learned from.
        chat = any(_is_messages(row.get(name)) for name in ANSWERS)
        answer = [{"role": "assistant", "content": "."}] if chat else "."
        row, columns = {**row, "completion": answer}, ("prompt", "completion")
    example = read_example(row, columns)
    if example.conversational and not example.prompt:
        raise BadRow("empty prompt", "column 'prompt' has no message; give a prompt")
    return replace(example, completions=(), extras={})


def _is_messages(value: Any) -> bool:  # noqa: ANN401 - whatever the data has
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping | list)


@dataclass(frozen=True)
class PromptJob(Job):
    """What is done to each batch of rows of prompts.

    Attributes:
        kept: Columns that travel along, with their types.
    """

    kept: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Dataset, job: Job) -> "PromptJob":
        """A job that keeps every column of some rows but the prompt."""
        kept = {name: kind for name, kind in rows.features.items() if name != "prompt"}
        return cls(**vars(job), kept=kept)

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Columns of token ids, with the kept ones together in one, where no name can clash with another."""
        made = super().__call__(batch, indices)
        if self.kept:
            values = zip(*(batch[name] for name in self.kept), strict=True)
            made["columns"] = [dict(zip(self.kept, row, strict=True)) for row in values]
        return made

    def _read(self, row: Mapping[str, Any]) -> tuple[Example, ...] | BadRow:
        try:
            return (read_prompt(row, self.columns),)
        except BadRow as problem:
            return problem

    def _record(self, example: Example, at: int) -> dict[str, Any]:
        tokens, text = self.encoder.prompt(example)
        messages = json.dumps(example.prompt) if example.conversational else None
        return {**self._row(tokens, at), "text": text, "messages": messages}

    def extras(self, columns: Iterable[str]) -> dict[str, Any]:
        """The prompt's text and messages, and the kept columns."""
        kept = {"columns": dict(self.kept)} if self.kept else {}
        return {"text": Value("string"), "messages": Value("string"), **kept}
