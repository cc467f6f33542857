"""Chat templates: conversations as text, and which of it the assistant wrote."""

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from jinja2.exceptions import TemplateError

from lightning_rlhf.data.formats import BadRow, Example
from lightning_rlhf.data.prompts import Messages

UNSTABLE = (
    "the chat template writes earlier turns differently once later ones follow, so the assistant's turns cannot be "
    "told apart. Put {% generation %} … {% endgeneration %} around them in the template, use loss_on='all', or give "
    "each turn as a row of its own with prompt and completion"
)


class Template:
    """A tokenizer's chat template.

    Args:
        tokenizer: Any tokenizer of Transformers.

    Raises:
        ValueError: If it has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise ValueError(
                f"the data is conversational, but the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} "
                "has no chat template. Use the tokenizer of an instruction-tuned model, set tokenizer.chat_template, "
                "or give the data as plain text"
            )
        template = tokenizer.chat_template
        self.source = str(template.get("default", "") if isinstance(template, dict) else template)

    @property
    def has_markers(self) -> bool:
        """Whether the template itself marks what the assistant wrote."""
        return any(f"{{%{dash} generation" in self.source for dash in ("", "-", "+"))

    def render(self, messages: Messages, example: Example, *, opening: bool = False) -> str:
        """A conversation as text.

        Args:
            messages: Its turns.
            example: Whose tools and template arguments are used.
            opening: Add what comes before an answer of the assistant; if the last turn is the assistant's own, leave
                it open instead.

        Raises:
            BadRow: If the template refuses it.
        """
        how = {"add_generation_prompt": opening}
        if opening and messages and messages[-1]["role"] == "assistant":
            how = {"continue_final_message": True}
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, tools=example.tools, **how, **example.template_kwargs
                )
            )
        except (TemplateError, ValueError, IndexError, TypeError) as error:
            raise BadRow(
                "refused by the chat template", f"the chat template refuses the conversation: {error}"
            ) from error

    def prompt_and_whole(self, example: Example) -> tuple[str, list[str]]:
        """The text of the prompt, and of the prompt with each completion."""
        prompt: Any = example.prompt or []
        wholes = [self.render([*prompt, *completion], example) for completion in example.completions]
        return (self.render(prompt, example, opening=True) if prompt else ""), wholes

    def mark(self, messages: Messages, example: Example) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them the assistant wrote.

        A template with ``{% generation %}`` markers says it itself. For any other, each of the assistant's turns is
        what rendering the conversation up to and with it adds to the conversation before it and the opening of an
        answer: the end of a turn counts, its beginning does not.

        Raises:
            BadRow: If the template is refused or changes earlier turns when later ones follow.
        """
        if self.has_markers:
            marked = self.tokenizer.apply_chat_template(
                messages,
                tools=example.tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **example.template_kwargs,
            )
            return list(marked["input_ids"]), [bool(counts) for counts in marked["assistant_masks"]]
        text = self.render(messages, example)
        return self._tokens_in(text, self._spans(text, messages, example))

    def _spans(self, text: str, messages: Messages, example: Example) -> list[tuple[int, int]]:
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], example) if index else ""
            opened = (
                commonprefix([self.render(messages[:index], example, opening=True), text]) if index else ""
            )
            after = self.render(messages[: index + 1], example)
            if not (text.startswith(before) and text.startswith(after) and len(opened) >= len(before)):
                raise BadRow("template not prefix-stable", UNSTABLE)
            spans.append((len(opened), len(after)))
        return spans

    def _tokens_in(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        if not self.tokenizer.is_fast:  # no offsets: pieces are tokenised apart
            return self._pieces(text, spans)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        mask = [
            any(begin <= start and end <= stop for begin, stop in spans) and start < end
            for start, end in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), mask

    def _pieces(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        at = 0
        for begin, end in [*spans, (len(text), len(text))]:
            for piece, counts in ((text[at:begin], False), (text[begin:end], True)):
                tokens = (
                    self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                    if piece
                    else []
                )
                ids.extend(tokens)
                mask.extend([counts] * len(tokens))
            at = end
        return ids, mask
