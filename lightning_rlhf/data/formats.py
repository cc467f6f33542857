"""Data formats: which columns a data set has, and what one row of them says."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_rlhf.data.annotations import read_label, read_margin, read_ranks
from lightning_rlhf.data.prompts import Text, split_prompt
from lightning_rlhf.data.report import BadRow

Task = Literal["sft", "preference", "unpaired", "prompt"]

PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
# The columns that make up each format, in the order in which they are looked for.
FORMATS: dict[Task, tuple[tuple[str, ...], ...]] = {
    "preference": (*PAIRS, ("prompt", "completions")),
    "unpaired": (("prompt", "completion", "label"), *PAIRS),
    "sft": (("prompt", "completion"), ("messages",), ("conversations",), ("text",)),
    "prompt": (("prompt",), ("chosen", "rejected")),
}
# How alike two names of columns are that may be, and that must be, one misspelt: prompt_id is no prompt, propmt is.
PERHAPS, SURELY = 0.7, 0.82
NAMES = {
    "sft": "supervised fine-tuning",
    "preference": "preference data",
    "unpaired": "unpaired preference data",
    "prompt": "prompts",
}
DATAMODULES = {
    "sft": "SFTDataModule",
    "preference": "PreferenceDataModule",
    "unpaired": "UnpairedDataModule",
    "prompt": "PromptDataModule",
}
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Example:
    """One row, whatever its format.

    Attributes:
        prompt: Text or messages; empty where there is none.
        completions: Of the same kind as the prompt, the best first. For language modelling, one, the whole text. None
            where there are prompts only.
        whole: Whether it is language modelling: nothing says where the prompt ends.
        tools: Descriptions of functions, for the chat template.
        template_kwargs: More for the chat template.
        extras: Numbers that travel along.
        ranks: One per completion, lower is better; None where the data does not rank.
    """

    prompt: Text
    completions: tuple[Text, ...]
    whole: bool = False
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, float] = field(default_factory=dict)
    ranks: tuple[float, ...] | None = None

    @property
    def conversational(self) -> bool:
        """Whether it holds messages, which need a chat template."""
        return isinstance((*self.completions, self.prompt)[0], list)


def recognise(columns: Sequence[str], task: Task, name: str = "the data") -> tuple[str, ...]:
    """The columns of the first format that a data set has whole.

    Args:
        columns: Of the data set; those that no format knows are ignored.
        task: Which formats are looked for.
        name: How an error names the data set.

    Returns:
        The format's columns.

    Raises:
        ValueError: If no format fits; names what looks misspelt.

    Example:
        >>> recognise(["id", "completion", "prompt"], "sft")
        ('prompt', 'completion')
        >>> recognise(["prompt", "chosn", "rejected"], "preference")
        Traceback (most recent call last):
        ValueError: the data has the columns prompt, chosn, rejected. For preference data it needs prompt + chosen +
        rejected, or chosen + rejected, or prompt + completions. Is 'chosn' a misspelling of 'chosen'? Rename it
    """
    for wanted in FORMATS[task]:
        missing = set(wanted) - set(columns)
        if not missing:
            return wanted
        if len(missing) < len(wanted) and _misspelt(columns, missing, SURELY):
            break  # a simpler format might fit, without the column that was meant
    choices = ", or ".join(" + ".join(wanted) for wanted in FORMATS[task])
    raise ValueError(
        f"{name} has the columns {', '.join(columns)}. For {NAMES[task]} it needs {choices}."
        f"{_suggestion(columns, task)}"
    )


def _suggestion(columns: Sequence[str], task: Task) -> str:
    # Nearly all data has prompts, and may be meant for another task with a column misspelt.
    fitting = [
        other
        for other, formats in FORMATS.items()
        if other != "prompt" and any(set(one) <= set(columns) for one in formats)
    ]
    if fitting and task not in (*fitting, "prompt"):
        return f" These are the columns of {NAMES[fitting[0]]}: use {DATAMODULES[fitting[0]]}"
    known = {column for wanted in FORMATS[task] for column in wanted} - set(columns)
    for column, meant in _misspelt(columns, known, PERHAPS):
        return f" Is {column!r} a misspelling of {meant!r}? Rename it"
    return " Rename your columns: a datamodule's columns={'question': 'prompt', …} does it"


def _misspelt(columns: Sequence[str], known: set[str], similarity: float) -> list[tuple[str, str]]:
    """Columns that look like a known one that is not there, each with the one it looks like."""
    found = []
    for column in columns:
        close = difflib.get_close_matches(column.lower().strip(), sorted(known), n=1, cutoff=similarity)
        found += [(column, meant) for meant in close]
    return found


def read_example(row: Mapping[str, Any], columns: tuple[str, ...]) -> Example:
    """Check one row and bring it into one shape.

    Args:
        row: Its values by column.
        columns: What :func:`recognise` returned.

    Returns:
        The example.

    Raises:
        BadRow: If a value is missing, has a wrong type or is empty, the completions of a pair are identical, or ranks
            contradict.

    Example:
        >>> row = {"chosen": "Sky? It is blue", "rejected": "Sky? It is black"}
        >>> example = read_example(row, ("chosen", "rejected"))
        >>> example.prompt, example.completions
        ('Sky? It is', (' blue', ' black'))
    """
    values = _texts(row, columns)
    tools, kwargs = (
        _json(row.get("tools"), "tools"),
        _json(row.get("chat_template_kwargs"), "chat_template_kwargs"),
    )
    whole = len(columns) == 1
    prompt: Text = values.pop("prompt", "")
    names = list(values)
    completions = list(values.values())
    if "chosen" in values and completions[0] == completions[1]:
        raise BadRow("identical pair", "'chosen' and 'rejected' are identical; a pair must differ")
    if not whole:
        prompt, completions = _same_kind(prompt, completions, explicit="prompt" in columns)
        if "chosen" in values and not prompt:
            prompt, completions = split_prompt(completions[0], completions[1])
    for name, completion in zip(names, completions, strict=True):
        if _blank(completion):
            raise BadRow("empty completion", f"column {name!r} is empty; there is nothing to learn from")
    if row.get("system"):
        prompt, completions = _with_system(str(row["system"]), prompt, completions, whole=whole)
    example = Example(prompt, tuple(completions), whole, tools or None, _without_nulls(kwargs or {}))
    return _annotated(example, row, columns)


def _annotated(example: Example, row: Mapping[str, Any], columns: tuple[str, ...]) -> Example:
    if "chosen" in columns:
        return replace(example, extras=read_margin(row))
    if "label" in columns:
        return replace(example, extras=read_label(row))
    if "completions" not in columns:
        return example
    ranks = read_ranks(row, example.completions)
    best_first = sorted(range(len(ranks)), key=ranks.__getitem__)
    return replace(
        example,
        completions=tuple(example.completions[i] for i in best_first),
        ranks=tuple(ranks[i] for i in best_first),
    )


def _texts(row: Mapping[str, Any], columns: tuple[str, ...]) -> dict[str, Text]:
    """The texts of a row by the name of their column; a ranking's completions are numbered."""
    found: dict[str, Text] = {}
    for column in columns:
        value = row.get(column)
        if column == "label":
            continue
        if column != "completions" or value is None:
            found[column] = _text(value, column)
            continue
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise BadRow(
                "wrong type",
                f"column 'completions' is {value!r:.40}; it must be a list of two or more completions",
            )
        found |= {f"completions[{k}]": _text(each, f"completions[{k}]") for k, each in enumerate(value)}
    return found


def unpair(example: Example) -> tuple[Example, ...]:
    """A pair as a desirable and an undesirable example; a labelled example as it is.

    Args:
        example: Of unpaired preference data, or a pair.

    Returns:
        Examples of one completion, each with a label among its extras.

    Example:
        >>> good, bad = unpair(Example("Sky?", (" blue", " black")))
        >>> good.completions, good.extras, bad.completions, bad.extras
        ((' blue',), {'label': 1.0}, (' black',), {'label': 0.0})
    """
    if "label" in example.extras:
        return (example,)
    chosen, rejected = example.completions
    return (
        replace(example, completions=(chosen,), extras={"label": 1.0}),
        replace(example, completions=(rejected,), extras={"label": 0.0}),
    )


def _text(value: Any, column: str) -> Text:  # noqa: ANN401 - whatever the data has
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRow("missing value", f"column {column!r} has no value (null); every row needs one")
    if isinstance(value, Sequence) and all(isinstance(message, Mapping) for message in value):
        return [_message(message, column) for message in value]
    raise BadRow(
        "wrong type",
        f"column {column!r} is of type {type(value).__name__}; it must be text or a list of messages "
        '{"role": …, "content": …}',
    )


def _message(message: Mapping[str, Any], column: str) -> dict[str, Any]:
    # Arrow gives every message every key that any message has: a null stands for "not there".
    given = {key: _without_nulls(value) for key, value in message.items() if value is not None}
    if "from" in given and "value" in given:
        role = str(given.pop("from"))
        given = {"role": ROLES.get(role, role), "content": given.pop("value"), **given}
    if not isinstance(given.get("role"), str) or not ("content" in given or "tool_calls" in given):
        found = ", ".join(given) or "nothing"
        raise BadRow(
            "wrong type", f"column {column!r} has a message with {found}; it needs 'role' and 'content'"
        )
    if not isinstance(given.setdefault("content", ""), str | list):
        kind = type(given["content"]).__name__
        raise BadRow(
            "wrong type", f"column {column!r} has a message whose 'content' is of type {kind}, not text"
        )
    return given


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 - whatever the data has
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _json(value: Any, column: str) -> Any:  # noqa: ANN401 - whatever the data has
    if not isinstance(value, str):
        return _without_nulls(value)
    try:
        return json.loads(value) if value else None
    except json.JSONDecodeError as error:
        raise BadRow("wrong type", f"column {column!r} is text but not JSON ({error.msg})") from error


def _same_kind(prompt: Text, completions: list[Text], *, explicit: bool) -> tuple[Text, list[Text]]:
    """Messages throughout, where any part is: text becomes the user's or the assistant's message."""
    if all(isinstance(part, str) for part in [prompt, *completions]):
        return prompt, completions
    answers: list[Text] = [
        [{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions
    ]
    if not isinstance(prompt, str):
        return prompt, answers
    if not explicit or any(answer and answer[0]["role"] != "assistant" for answer in answers):  # type: ignore[index]
        return [], answers  # completions that begin with the user's turn hold their prompt themselves
    return ([{"role": "user", "content": prompt}] if prompt else []), answers


def _blank(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return not any(
        m["content"].strip() if isinstance(m["content"], str) else m["content"] for m in text
    ) and not any("tool_calls" in m for m in text)


def _with_system(
    system: str, prompt: Text, completions: list[Text], *, whole: bool
) -> tuple[Text, list[Text]]:
    message = {"role": "system", "content": system}
    first = completions[0] if whole else prompt
    if not isinstance(completions[0], list) or (first and first[0]["role"] == "system"):  # type: ignore[index]
        return prompt, completions
    if whole:
        return prompt, [[message, *completion] for completion in completions]
    return [message, *prompt], completions
