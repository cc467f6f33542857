"""A training example as its tokens, with what is learned from marked."""

from typing import Any, NamedTuple

from rich.text import Text

from lightning_rlhf.data.packing import PackedBatch

STYLES = {"prompt": "dim", "counted": "bold green", "ignored": "yellow", "special": "magenta"}
MAX_TOKENS = 400


class Example(NamedTuple):
    """One prompt with its completions.

    Attributes:
        row_id: Its row in the data.
        prompt: Token ids.
        completions: Token ids, each with whether it counts.
    """

    row_id: int
    prompt: list[int]
    completions: list[list[tuple[int, bool]]]


def first_example(batch: PackedBatch) -> Example:
    """The first group of a batch, its masks read back from what the batch says is predicted.

    Example:
        >>> from lightning_rlhf.data.packing import PromptGroup, pack
        >>> first_example(pack([PromptGroup([5], [[6, 7], [8]], masks=[[False, True], [True]], row_id=3)]))
        Example(row_id=3, prompt=[5], completions=[[(6, False), (7, True)], [(8, True)]])
    """
    ids, predictors = batch.input_ids.tolist(), batch.predictors.tolist()
    last_of_prompt = batch.prompt_lengths[0] - 1
    completions, start, read = [], batch.prompt_lengths[0], 0
    for length, count in zip(batch.completion_lengths[0], batch.num_targets, strict=False):
        before = [last_of_prompt, *range(start, start + length - 1)]
        counted = set(predictors[read : read + count])
        completions.append([(ids[start + j], predecessor in counted) for j, predecessor in enumerate(before)])
        start, read = start + length, read + count
    return Example(batch.row_ids[0], ids[: batch.prompt_lengths[0]], completions)


def render(example: Example, tokenizer: Any) -> Text:  # noqa: ANN401 - any tokenizer
    """An example for a terminal: tokens apart by ``|``, runs that count inside ``[ ]`` and green.

    Args:
        example: See :func:`first_example`.
        tokenizer: Of the model.

    Returns:
        The text, legible without colours; the middle of long parts is left out.
    """
    text = Text()
    text.append("prompt      ", "bold")
    _append(text, [(token, False) for token in example.prompt], tokenizer, other="prompt")
    for number, completion in enumerate(example.completions, start=1):
        text.append(f"\ncompletion {number}" if len(example.completions) > 1 else "\ncompletion  ", "bold")
        text.append(" ")
        _append(text, completion, tokenizer, other="ignored")
    return text


def _append(text: Text, tokens: list[tuple[int, bool]], tokenizer: Any, *, other: str) -> None:  # noqa: ANN401
    special = set(tokenizer.all_special_ids)
    half, inside = MAX_TOKENS // 2, False
    for index, (token, counts) in enumerate(tokens):
        if len(tokens) > MAX_TOKENS and half <= index < len(tokens) - half:
            if index == half:
                text.append(f" … {len(tokens) - MAX_TOKENS} tokens … ", "dim")
            continue
        if counts != inside:
            text.append("[" if counts else "]", STYLES["counted"])
            inside = counts
        elif index:
            text.append("|", "dim")
        style = STYLES["counted" if counts else other]
        text.append(_shown(token, tokenizer), style + " " + STYLES["special"] if token in special else style)
    if inside:
        text.append("]", STYLES["counted"])


def _shown(token: int, tokenizer: Any) -> str:  # noqa: ANN401
    piece = tokenizer.decode([token])
    return (piece or tokenizer.convert_ids_to_tokens(token)).replace("\n", "\\n").replace("\t", "\\t")
