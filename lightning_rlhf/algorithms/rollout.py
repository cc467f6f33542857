"""A rollout: prompts, sampled completions, and what was known of every token when they were sampled."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data import PromptBatch
from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from lightning_rlhf.generation import Completion, Generator, Sampling
from lightning_rlhf.models import LanguageModel
from lightning_rlhf.rewards import RewardResult, Samples


class Micro(NamedTuple):
    """What one forward and backward sees: some completions, and values of their tokens in the batch's order."""

    batch: PackedBatch
    tokens: dict[str, Tensor]

    def to(self, device: torch.device) -> "Micro":
        """The same with its batch on a device; the values are where the rollout's are."""
        return Micro(self.batch.to(device), self.tokens)


@dataclass(frozen=True)
class Rollout:
    """Sampled completions, those of a prompt one after the other: N in all, with M tokens.

    Attributes:
        groups: Every prompt with its completions.
        samples: The same, as rewards see them.
        behaviour: Log-probabilities that the sampler reported, ``(M,)``; None where the policy itself sampled.
    """

    groups: tuple[PromptGroup, ...]
    samples: Samples
    behaviour: Tensor | None

    def __len__(self) -> int:
        """N, the number of completions."""
        return len(self.samples)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(ids) for ids in self.samples.completion_ids]

    @cached_property
    def owners(self) -> list[tuple[int, int]]:
        """Of each completion, its group and its place in it."""
        return [(g, k) for g, group in enumerate(self.groups) for k in range(len(group.completions))]

    def select(self, indices: Sequence[int], tokens: Mapping[str, Tensor]) -> Micro:
        """Some completions with their tokens' values; those of one prompt share it.

        Args:
            indices: Places among the N completions.
            tokens: Values of all tokens by name, each ``(M,)``.
        """
        chosen: dict[int, list[int]] = {}
        for index in indices:
            chosen.setdefault(self.owners[index][0], []).append(index)
        groups = []
        for g, members in chosen.items():
            completions = [self.groups[g].completions[self.owners[i][1]] for i in members]
            groups.append(PromptGroup(self.groups[g].prompt, completions, row_id=self.groups[g].row_id))
        order = [index for members in chosen.values() for index in members]
        parts = {name: values.split(self.lengths) for name, values in tokens.items()}
        return Micro(pack(groups), {n: torch.cat([split[i] for i in order]) for n, split in parts.items()})

    def in_order(self, size: int, budget: int | None = None) -> Iterator[PackedBatch]:
        """All completions in their order, whole prompts at a time.

        Args:
            size: Completions a batch at most, but for one prompt that has more.
            budget: Tokens a batch at most, likewise.
        """
        counts = [len(group.completions) for group in self.groups]
        tokens = [len(group.prompt) + sum(map(len, group.completions)) for group in self.groups]
        for run in bounded_runs(counts, tokens, size, budget):
            yield pack(self.groups[place] for place in run)

    def cut(self, indices: Sequence[int], size: int | None, budget: int | None) -> list[list[int]]:
        """Some completions in runs of bounded size, in their order.

        Args:
            indices: Places among the N completions.
            size: Completions a run at most.
            budget: Tokens a run at most, each prompt counted once a completion.
        """
        tokens = [self.lengths[index] + len(self.samples.prompt_ids[index]) for index in indices]
        runs = bounded_runs([1] * len(tokens), tokens, size, budget)
        return [[indices[place] for place in run] for run in runs]


class Scored(NamedTuple):
    """A rollout of training, and what was known of its completions: rewards and the KL in nats, each ``(N,)``."""

    rollout: Rollout
    rewards: RewardResult
    kl: Tensor


def bounded_runs(
    counts: Sequence[int], tokens: Sequence[int], size: int | None, budget: int | None
) -> list[list[int]]:
    """Neighbouring places whose counts add up to ``size`` and tokens to ``budget`` at most; at least one a run.

    Example:
        >>> bounded_runs([1, 1, 1, 1], [5, 5, 9, 30], 3, 12)
        [[0, 1], [2], [3]]
    """
    runs: list[list[int]] = [[]]
    count = total = 0
    for place, (more, cost) in enumerate(zip(counts, tokens, strict=True)):
        count, total = count + more, total + cost
        full = (size is not None and count > size) or (budget is not None and total > budget)
        if runs[-1] and full:
            runs.append([])
            count, total = more, cost
        runs[-1].append(place)
    return runs


def sample_rollout(
    batch: PromptBatch,
    generator: Generator,
    policy: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    seeds: Sequence[int],
) -> Rollout:
    """Sample completions of prompts.

    Args:
        batch: The prompts.
        generator: What samples.
        policy: From what.
        tokenizer: Of the policy.
        sampling: How.
        seeds: One a prompt.

    Returns:
        The rollout.

    Raises:
        ValueError: If a prompt has no token or leaves no room for ``max_new_tokens``, or a completion came back empty.
    """
    room = policy.context_length
    for row, ids in zip(batch.row_ids, batch.prompt_ids, strict=True):
        if not ids:
            raise ValueError(f"row {row}: the prompt has no token; give it a start token")
        if room is not None and len(ids) + sampling.max_new_tokens > room:
            raise ValueError(
                f"row {row}: the prompt has {len(ids)} tokens, and with sampling.max_new_tokens "
                f"({sampling.max_new_tokens}) that is more than the {room} positions of the policy: lower it, or set "
                "the data's max_prompt_length"
            )
    drawn = list(generator.generate(policy, tokenizer, batch.prompt_ids, sampling, seeds=seeds))
    for row, completions in zip(batch.row_ids, drawn, strict=True):
        if not all(len(one.tokens) for one in completions):
            raise ValueError(
                f"row {row}: the sampler returned an empty completion; at least an end-of-sequence token is expected"
            )
    groups = tuple(
        PromptGroup(prompt, [one.tokens for one in completions], row_id=row)
        for prompt, completions, row in zip(batch.prompt_ids, drawn, batch.row_ids, strict=True)
    )
    return Rollout(groups, as_samples(batch, drawn), _behaviour(drawn))


def as_samples(batch: PromptBatch, drawn: Sequence[Sequence[Completion]]) -> Samples:
    """Prompts and their completions as rewards see them."""
    flat = [(place, one) for place, completions in enumerate(drawn) for one in completions]
    return Samples(
        prompts=[batch.prompts[place] for place, _ in flat],
        completions=[one.text for _, one in flat],
        prompt_ids=[one.prompt for _, one in flat],
        completion_ids=[one.tokens for _, one in flat],
        truncated=[one.truncated for _, one in flat],
        columns={name: [values[place] for place, _ in flat] for name, values in batch.columns.items()},
    )


def _behaviour(drawn: Sequence[Sequence[Completion]]) -> Tensor | None:
    reported = [one.logprobs for completions in drawn for one in completions]
    if any(one is None for one in reported):
        return None
    return torch.tensor([value for one in reported for value in one or ()], dtype=torch.float32)


def prompt_seeds(seed: int, iteration: int, row_ids: Sequence[int]) -> list[int]:
    """A seed for each prompt of an iteration: the same on any number of ranks, and after a resume.

    Example:
        >>> prompt_seeds(0, 3, [7, 8]) == prompt_seeds(0, 3, [7, 8]) != prompt_seeds(0, 4, [7, 8])
        True
    """
    digests = (hashlib.blake2b(f"{seed}:{iteration}:{row}".encode(), digest_size=7) for row in row_ids)
    return [int.from_bytes(digest.digest(), "big") for digest in digests]


def shuffled(count: int, size: int, seed: Sequence[int]) -> list[list[int]]:
    """Places 0 to ``count`` − 1 in an order drawn by a seed, in runs of ``size``; the last may be shorter.

    Example:
        >>> sorted(place for run in shuffled(5, 2, (0, 1)) for place in run)
        [0, 1, 2, 3, 4]
    """
    order = list(range(count))
    random.Random(":".join(map(str, seed))).shuffle(order)
    return [order[start : start + size] for start in range(0, count, size)]
