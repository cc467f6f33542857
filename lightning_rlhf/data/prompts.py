"""Where, in two completions that hold it, their prompt ends."""

import re
from itertools import takewhile
from typing import Any

Messages = list[dict[str, Any]]
Text = str | Messages
# Where an answer begins in a conversation written as plain text; what follows it belongs to a completion.
ANSWER = re.compile(
    r"(?:^|\n)(?:Assistant|AI|Bot|Answer|A):|<\|assistant\|>\n?|<\|im_start\|>assistant\n|\[/INST\]"
    r"|<start_of_turn>model\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
)


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, list[Text]]:
    r"""The prompt that two completions share: their longest common prefix, cut back to where an answer begins.

    For messages that is a turn. For text it is the last ``Assistant:`` (or another sign that an answer begins) in the
    common prefix; without one, the end of a word, its space left to the completions, so that no token is cut.

    Args:
        chosen: Text or messages.
        rejected: Of the same kind.

    Returns:
        The prompt, and what is left of both.

    Example:
        >>> split_prompt("\n\nHuman: Hi\n\nAssistant: I do.", "\n\nHuman: Hi\n\nAssistant: I am.")
        ('\n\nHuman: Hi\n\nAssistant:', [' I do.', ' I am.'])
    """
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str) and isinstance(rejected, str):
        common = _boundary(chosen, rejected, common)
    else:
        common = max(0, min(common, len(chosen) - 1, len(rejected) - 1))
    return chosen[:common], [chosen[common:], rejected[common:]]


def _boundary(chosen: str, rejected: str, common: int) -> int:
    ends = [match.end() for match in ANSWER.finditer(chosen[:common])]
    if ends:
        return ends[-1]
    if common < min(len(chosen), len(rejected)) and common and chosen[common - 1] == "\n":
        return common
    # Back to the beginning of the word in which they part, then over the spaces before it.
    while common and not chosen[common - 1].isspace():
        common -= 1
    return len(chosen[:common].rstrip(" "))


def prompt_ids(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:  # noqa: ANN401
    """Token ids of a prompt: messages by the chat template, text as it is, at least one token.

    Args:
        tokenizer: Of the model.
        prompt: Text or messages.

    Returns:
        The ids.
    """
    if isinstance(prompt, list):
        return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    ids = list(tokenizer(prompt).input_ids)
    if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids.pop()  # some tokenizers close every text; a prompt goes on
    return ids or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
