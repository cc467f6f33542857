"""Sampling completions with Transformers' ``generate``."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Tokens at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Nucleus: the likeliest tokens that together have this probability.
        top_k: The likeliest k tokens; 0 for all.
        num_samples: Completions a prompt.
        batch_size: Prompts at a time.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        if self.max_new_tokens < 1 or self.num_samples < 1 or self.batch_size < 1:
            raise ValueError("max_new_tokens, num_samples and batch_size must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("greedy samples are all the same: give a temperature, or num_samples 1")


class Completion(NamedTuple):
    """A sampled completion.

    Attributes:
        prompt: Token ids of its prompt.
        tokens: Its own token ids, the end-of-sequence token included where there is one.
        text: Decoded, without special tokens.
        truncated: Whether it was cut off before it ended.
    """

    prompt: list[int]
    tokens: list[int]
    text: str
    truncated: bool


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Iterator[list[Completion]]:
    """Sample completions, batch by batch; uses torch's global random state.

    Args:
        model: The policy. Its train or eval mode is restored after each batch.
        tokenizer: Decodes, and names the end-of-sequence token.
        prompts: Token ids; any lengths.
        sampling: See :class:`Sampling`.

    Yields:
        The completions of one prompt after the other.
    """
    was_training = model.training
    end = _end_ids(model, tokenizer)
    for start in range(0, len(prompts), sampling.batch_size):
        chunk = [list(prompt) for prompt in prompts[start : start + sampling.batch_size]]
        model.eval()
        try:
            output = _run(model, chunk, sampling, end)
        finally:
            model.train(was_training)
        for index, prompt in enumerate(chunk):
            rows = output[index * sampling.num_samples : (index + 1) * sampling.num_samples]
            yield [_completion(prompt, row, end, tokenizer) for row in rows]


def _run(
    model: LanguageModel, prompts: list[list[int]], sampling: Sampling, end: list[int]
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    # Padded on the left by hand: the mask comes from lengths, so any id serves, pad token or not.
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    sample = sampling.temperature > 0
    choices = (
        {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        if sample
        else {}
    )
    run = cast(Callable[..., torch.Tensor], model.model.generate)  # PEFT and Transformers type it differently
    output = run(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sample,
        num_return_sequences=sampling.num_samples,
        eos_token_id=end,
        pad_token_id=end[0],
        use_cache=True,
        **choices,
    )
    return output[:, width:].tolist()


def _completion(
    prompt: list[int], row: list[int], end: list[int], tokenizer: PreTrainedTokenizerBase
) -> Completion:
    stop = next((i for i, token in enumerate(row) if token in end), None)
    tokens = row if stop is None else row[: stop + 1]
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return Completion(prompt, tokens, text, stop is None)


def _end_ids(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and those of the model's generation settings (chat models have several)."""
    configured = model.causal_lm.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id] + (configured if isinstance(configured, list) else [configured])
    ids = [token for token in dict.fromkeys(ids) if token is not None]
    if not ids:
        raise ValueError(
            "neither tokenizer nor generation settings name an end-of-sequence token: set eos_token"
        )
    return ids
