"""From an example to token ids: prompt, completions, and which of their tokens count."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_rlhf.data.formats import Example
from lightning_rlhf.data.report import BadRow
from lightning_rlhf.data.templates import Template

LossOn = Literal["answers", "completion", "assistant", "all"]


@dataclass(frozen=True)
class Limits:
    """How long a row may be.

    Attributes:
        max_length: Tokens of prompt + completion; completions are cut from the right.
        max_prompt_length: Tokens of a prompt; cut from the left, a start token kept.
    """

    max_length: int | None = 1024
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or null for no limit")
        if self.max_length is not None and (self.max_prompt_length or 0) >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be less than max_length ({self.max_length}), "
                "which counts prompt and completion"
            )


@dataclass(frozen=True)
class Tokens:
    """A row as token ids.

    Attributes:
        prompt: At least one token.
        completions: Each at least one token.
        masks: Which tokens of each completion count; None where all do.
        prompt_cut: Whether the prompt was truncated.
        completions_cut: How many completions were.
        extras: Numbers that travel along.
        ranks: One per completion, lower is better; None where the data does not rank.
    """

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]] | None = None
    prompt_cut: bool = False
    completions_cut: int = 0
    extras: dict[str, float] = field(default_factory=dict)
    ranks: tuple[float, ...] | None = None


class Encoder:
    """Tokenises examples.

    The ids of prompt and completion, put together, are those of the whole text: where a token spans the border, the
    border moves before it, as in TRL. Only where not even one token of the prompt stands are the two tokenised apart.
    A completion of plain text ends with EOS exactly once; a chat template closes its own.

    Args:
        tokenizer: Any tokenizer of Transformers, whatever special tokens it has or lacks.
        limits: How long rows may be.
        loss_on: ``"completion"``: all of a completion. ``"assistant"``: the assistant's turns of a conversation.
            ``"all"``: every token but the first. ``"answers"``: the assistant's turns of ``messages``, the completion
            where there is a prompt, and all of a ``text``.
    """

    def __init__(self, tokenizer: Any, limits: Limits, loss_on: LossOn = "answers") -> None:  # noqa: ANN401
        self.tokenizer = tokenizer
        self.limits = limits
        self.loss_on = loss_on
        self.eos: int | None = tokenizer.eos_token_id
        self.prefix = _prefix(tokenizer)
        self._template: Template | None = None
        self._known: dict[str, list[int]] = {}

    @property
    def template(self) -> Template:
        """The tokenizer's chat template."""
        if self._template is None:
            self._template = Template(self.tokenizer)
        return self._template

    def __call__(self, example: Example) -> Tokens:
        """Token ids of an example, within the limits.

        Raises:
            BadRow: If it cannot be used.
            ValueError: If the tokenizer has no chat template and needs one.
        """
        if self.loss_on == "assistant" and not example.conversational:
            raise ValueError(
                "loss_on='assistant' needs conversational data; for plain text use 'completion' or 'all'"
            )
        turns = self.loss_on == "answers" and example.whole and example.conversational
        if self.loss_on == "assistant" or turns:
            tokens = self._assistant(example)
        elif example.whole or self.loss_on == "all":
            tokens = self._from_start(self._texts(example)[1], example)
        else:
            tokens = self._completion(example)
        tokens = replace(tokens, extras=example.extras, ranks=example.ranks)
        return truncate(tokens, self.limits, keep=self._kept(tokens.prompt))

    def prompt(self, example: Example) -> tuple[Tokens, str]:
        """Token ids of a prompt that is to be answered, within the limits, and the text that they stand for.

        Raises:
            BadRow: If it is empty and no start token can stand for it, or too long.
            ValueError: If the tokenizer has no chat template and needs one.
        """
        text = self.template.prompt_and_whole(example)[0] if example.conversational else str(example.prompt)
        ids = ([] if example.conversational else self.prefix) + self._ids(text)
        start = self.tokenizer.bos_token_id
        if not ids and start is None:
            raise BadRow(
                "empty prompt",
                "column 'prompt' is empty, and the tokenizer has no BOS token to stand for it; give a prompt",
            )
        tokens = Tokens(ids or [start], [])
        return truncate(tokens, self.limits, keep=self._kept(tokens.prompt)), text

    def _kept(self, prompt: Sequence[int]) -> int:
        if prompt and prompt[0] == self.tokenizer.bos_token_id:
            return 1
        return len(self.prefix) if self.prefix and list(prompt[: len(self.prefix)]) == self.prefix else 0

    def prepare(self, examples: Iterable[Example]) -> None:
        """Tokenise the plain texts of some examples together, which is faster than one by one."""
        texts = {""}
        for example in examples:
            if not example.conversational:
                texts |= {str(example.prompt), *(str(example.prompt) + str(c) for c in example.completions)}
        texts.discard("")
        listed = sorted(texts)
        ids = self.tokenizer(listed, add_special_tokens=False, verbose=False)["input_ids"] if listed else []
        self._known = dict(zip(listed, map(list, ids), strict=True))

    def _ids(self, text: str) -> list[int]:
        if text in self._known:
            return list(self._known[text])
        return (
            list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
        )

    def _closed(self, ids: list[int]) -> list[int]:
        return ids if self.eos is None or ids[-1:] == [self.eos] else [*ids, self.eos]

    def _texts(self, example: Example) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt, and of the prompt with each completion."""
        if example.conversational:
            prompt, wholes = self.template.prompt_and_whole(example)
            return self._ids(prompt), [self._ids(whole) for whole in wholes]
        texts = [str(example.prompt) + str(completion) for completion in example.completions]
        return self.prefix + self._ids(str(example.prompt)), [
            self.prefix + self._closed(self._ids(text)) for text in texts
        ]

    def _completion(self, example: Example) -> Tokens:
        prompt, wholes = self._texts(example)
        border = min(_common(prompt, whole) for whole in wholes)
        if border and (border > len(self.prefix) or len(prompt) == len(self.prefix)):
            return Tokens(prompt[:border], [whole[border:] for whole in wholes])
        if prompt[len(self.prefix) :] and not example.conversational:
            apart = [self._closed(self._ids(str(completion))) for completion in example.completions]
            return Tokens(prompt, apart)
        return self._from_start(wholes, example)

    def _from_start(self, wholes: list[list[int]], example: Example) -> Tokens:
        """Everything but the first token counts; BOS is that token unless a template decides what comes first."""
        start = self.tokenizer.bos_token_id
        shared = {whole[0] for whole in wholes}
        if example.conversational or start is None or shared == {start}:
            if len(shared) > 1:
                raise BadRow(
                    "empty prompt",
                    "the prompt is empty, and the tokenizer has no BOS token to stand for it; give a prompt",
                )
            return Tokens(wholes[0][:1], [whole[1:] for whole in wholes])
        return Tokens([start], wholes)

    def _assistant(self, example: Example) -> Tokens:
        messages: Any = [*(example.prompt or []), *example.completions[0]]
        ids, mask = self.template.mark(messages, example)
        if not example.whole:
            border = _common(self._ids(self.template.prompt_and_whole(example)[0]), ids)
            mask = [False] * border + mask[border:]
        if True not in mask[1:]:
            raise BadRow(
                "no assistant turn",
                "no token is written by the assistant; a conversation needs one of its turns",
            )
        first = mask.index(True, 1)
        last = len(mask) - mask[::-1].index(True)  # what follows the last answer teaches nothing
        return Tokens(ids[:first], [ids[first:last]], [mask[first:last]])


def truncate(tokens: Tokens, limits: Limits, *, keep: int = 0) -> Tokens:
    """Cut the prompt from the left, then completions from the right.

    Args:
        tokens: The row.
        limits: How long it may be.
        keep: Tokens at the beginning of the prompt that stay, such as BOS.

    Returns:
        The row within the limits.

    Raises:
        BadRow: If a completion is empty, or the prompt leaves it no room.

    Example:
        >>> cut = truncate(Tokens([1, 5, 6, 7], [[8, 9], [10]]), Limits(4, 3), keep=1)
        >>> cut.prompt, cut.completions, cut.prompt_cut, cut.completions_cut
        ([1, 6, 7], [[8], [10]], True, 1)
    """
    prompt, limit = tokens.prompt, limits.max_prompt_length
    if limit is not None and len(prompt) > limit:
        keep = min(keep, limit - 1)
        prompt = prompt[:keep] + prompt[len(prompt) - (limit - keep) :]
    if not all(tokens.completions):
        raise BadRow("empty completion", "a completion has no token; there is nothing to learn from")
    room = None if limits.max_length is None else limits.max_length - len(prompt)
    if room is not None and room < 1:
        raise BadRow(
            "prompt too long",
            f"column 'prompt' has {len(prompt)} tokens, which leaves no room for a completion within max_length "
            f"({limits.max_length}); raise max_length, or set max_prompt_length to cut prompts from the left",
        )
    masks = None if tokens.masks is None else [mask[:room] for mask in tokens.masks]
    if masks is not None and not all(any(mask) for mask in masks):
        raise BadRow(
            "nothing left to learn", "truncation to max_length leaves no token that counts; raise max_length"
        )
    return replace(
        tokens,
        prompt=prompt,
        completions=[completion[:room] for completion in tokens.completions],
        masks=masks,
        prompt_cut=len(prompt) < len(tokens.prompt),
        completions_cut=sum(room is not None and len(c) > room for c in tokens.completions),
    )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def _prefix(tokenizer: Any) -> list[int]:  # noqa: ANN401
    """The special tokens that a tokenizer puts before a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    special = list(tokenizer("a")["input_ids"])
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return special[:start]
    return []
