"""Sampling completions with Transformers' ``generate``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_rlhf.generation.choosing import SeededChoice, StopStrings, before_stop, uniform_numbers
from lightning_rlhf.generation.prefill import sampling_cache
from lightning_rlhf.models import LanguageModel
from lightning_rlhf.models.compilation import uncompiled
from lightning_rlhf.models.modes import in_eval_mode
from lightning_rlhf.models.sharding import gathered

SORTED_BATCHES = 8
"""So many batches of prompts are put in the order of their lengths, and answered together."""


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
        min_new_tokens: Tokens before the end-of-sequence token may come. Until then the distribution is another than
            the model's, as with ``top_p`` and ``top_k``.
        stop: Strings that end a completion. The text ends before the string; the tokens end with the one that
            completes it, since the policy chose them.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1
    batch_size: int = 32
    min_new_tokens: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        if self.max_new_tokens < 1 or self.num_samples < 1 or self.batch_size < 1:
            raise ValueError("max_new_tokens, num_samples and batch_size must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("greedy samples are all the same: give a temperature, or num_samples 1")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"top_p ({self.top_p}) must lie in (0, 1], and top_k ({self.top_k}) not be negative"
            )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) must lie between 0 and max_new_tokens ({self.max_new_tokens})"
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a list of strings that are not empty, got {self.stop!r}")


class Completion(NamedTuple):
    """A sampled completion.

    Attributes:
        prompt: Token ids of its prompt.
        tokens: Its own token ids, the end-of-sequence token included where there is one.
        text: Decoded, without special tokens, up to a stop string.
        truncated: Whether it was cut off before it ended.
        logprobs: Log-probability of each token as the sampler reports it, in nats; None where the sampler is the
            policy itself.
    """

    prompt: list[int]
    tokens: list[int]
    text: str
    truncated: bool
    logprobs: list[float] | None = None


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Sequence[int] | None = None,
) -> Iterator[list[Completion]]:
    """Sample completions, several batches of prompts of a like length at a time.

    A sharded model is gathered meanwhile, so that ranks may sample other numbers and lengths.

    Every prompt has its own seed, and its samples do not depend on the prompts beside it, apart from rounding. Only
    what ``sampling`` says changes the model's distribution: what came with the model (a repetition penalty, a top-k)
    is left out. The samples of a prompt share its computation where the model allows it.

    Args:
        model: The policy. Whatever mode its parts are in, they are in again after each batch.
        tokenizer: Decodes, and names the end-of-sequence token.
        prompts: Token ids; any lengths, at least one token each.
        sampling: See :class:`Sampling`.
        seeds: One per prompt; by default drawn from torch's global random state, once for all prompts.

    Yields:
        The completions of one prompt after the other.

    Raises:
        ValueError: If a prompt is empty, the seeds are not one per prompt, or nothing names the end-of-sequence token.
    """
    seeds = check_prompts(prompts, seeds)
    end = end_ids(model, tokenizer)
    window = SORTED_BATCHES * sampling.batch_size
    with gathered(model):
        for start in range(0, len(prompts), window):
            places = range(start, min(start + window, len(prompts)))
            found: dict[int, list[Completion]] = {}
            for chunk in by_length(places, prompts, sampling.batch_size):
                of_chunk = ([list(prompts[i]) for i in chunk], [seeds[i] for i in chunk])
                with sampling_mode(model):
                    found |= zip(chunk, _run(model, tokenizer, *of_chunk, sampling, end), strict=True)
            yield from (found[place] for place in places)


def by_length(places: Sequence[int], prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Places of prompts in runs of ``size``, the longest first: prompts of a like length need little padding.

    Example:
        >>> by_length(range(4), ["a", "bcde", "fg", "hijkl"], 2)
        [[3, 1], [2, 0]]
    """
    order = sorted(places, key=lambda place: len(prompts[place]), reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]


def check_prompts(prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None) -> Sequence[int]:
    """The seeds, one per prompt, drawn where none are given.

    Raises:
        ValueError: If a prompt is empty, or the seeds are not one per prompt.
    """
    empty = next((index for index, prompt in enumerate(prompts) if not len(prompt)), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} has no token: give it a start token")
    if seeds is None:
        return cast(list[int], torch.randint(2**62, (len(prompts),)).tolist())
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one per prompt")
    return seeds


@contextmanager
def sampling_mode(model: LanguageModel) -> Iterator[None]:
    """Eval mode, layers uncompiled, no generation settings but those asked for; afterwards all is as it was."""
    settings = model.causal_lm.generation_config
    model.causal_lm.generation_config = GenerationConfig()
    try:
        with in_eval_mode(model), uncompiled(model):
            yield
    finally:
        model.causal_lm.generation_config = settings


def _run(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    end: list[int],
) -> list[list[Completion]]:
    """The completions of every prompt of a batch."""
    width = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    # Padded on the left by hand: the mask comes from lengths, so any id serves, pad token or not.
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = sampling_cache(model, ids, mask, sampling.num_samples)
    stop = StopStrings(sampling.stop, tokenizer, width) if sampling.stop else None
    kept: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    run = cast(Callable[..., torch.Tensor], model.model.generate)  # PEFT and Transformers type it differently
    output = run(
        input_ids=ids.repeat_interleave(sampling.num_samples, 0),
        attention_mask=mask.repeat_interleave(sampling.num_samples, 0),
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        do_sample=False,
        logits_processor=_processors(sampling, seeds, width, device),
        stopping_criteria=StoppingCriteriaList([] if stop is None else [stop]),
        eos_token_id=end,
        pad_token_id=end[0],
        use_cache=True,
        synced_gpus=False,  # weights are gathered: ranks need not wait for each other's longest completion
        **kept,
    )
    lengths = {} if stop is None else stop.lengths
    flat = [
        _completion(prompts[i // sampling.num_samples], row, lengths.get(i), end, tokenizer, sampling.stop)
        for i, row in enumerate(output[:, width:].tolist())
    ]
    return [flat[i : i + sampling.num_samples] for i in range(0, len(flat), sampling.num_samples)]


def _processors(
    sampling: Sampling, seeds: Sequence[int], width: int, device: torch.device
) -> LogitsProcessorList:
    """What makes logits a choice; nothing for greedy search."""
    found = LogitsProcessorList()
    if sampling.temperature == 0:
        return found
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    numbers = uniform_numbers(seeds, sampling.num_samples, sampling.max_new_tokens)
    found.append(SeededChoice(numbers.to(device), width))
    return found


def _completion(
    prompt: list[int],
    row: list[int],
    stopped: int | None,
    end: list[int],
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[str],
) -> Completion:
    ended = next((i + 1 for i, token in enumerate(row) if token in end), None)
    length = min(ended or len(row), stopped or len(row))
    text = str(tokenizer.decode(row[:length], skip_special_tokens=True))
    if stopped == length:
        text = before_stop(text, stop)
    return Completion(prompt, row[:length], text, truncated=ended is None and stopped is None)


def end_ids(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and those of the model's generation settings (chat models have several).

    Raises:
        ValueError: If there is none.
    """
    configured = model.causal_lm.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id] + (configured if isinstance(configured, list) else [configured])
    ids = [token for token in dict.fromkeys(ids) if token is not None]
    if not ids:
        raise ValueError(
            "neither tokenizer nor generation settings name an end-of-sequence token: set eos_token"
        )
    return ids
