"""The one data structure: prompt groups, each a prompt with k completions, laid end to end without padding."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptGroup:
    """One prompt with k completions, as token ids.

    Attributes:
        prompt: At least one token: the first token of a completion needs a predecessor that predicts it.
        completions: k lists of token ids; order is the data's (chosen before rejected, best first).
        masks: For each completion, which of its tokens count; None where all do.
        row_id: Where the group stands in its data set: the key of stored reference log-probabilities.
        extras: Numbers that travel along, such as a margin.
        ranks: One per completion, lower is better, ties allowed; None where the order is all there is to know.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    masks: Sequence[Sequence[bool]] | None = None
    row_id: int = -1
    extras: dict[str, float] = field(default_factory=dict)
    ranks: Sequence[float] | None = None


class Segment(NamedTuple):
    """A run of queries in the packed row and the prompt it sees; it sees itself causally.

    ``prompt_start == prompt_end`` where the run holds its own prompt: a group's first completion follows its
    prompt directly, so the two are one plain causal sequence.
    """

    start: int
    end: int
    prompt_start: int
    prompt_end: int


class RowPart(NamedTuple):
    """Part of the packed row, for a forward of its own.

    Attributes:
        tokens: Where its tokens stand in the whole row, on the host.
        segments: Its runs; a place is counted from the first token of the part before it, if there is one.
    """

    tokens: Tensor
    segments: tuple[Segment, ...]


class PaddedBatch(NamedTuple):
    """The same groups, one row per prompt + completion: the reference that the packed layout is tested against.

    Attributes:
        input_ids: ``(N, L)``; padded on the right with 0, which nothing reads.
        attention_mask: ``(N, L)``, boolean, from lengths.
        position_ids: ``(N, L)``.
        predictors: Flat indices into ``N·L`` of the positions that predict a target, ``(M,)``.
        ends: Flat indices of the last token of each completion, ``(N,)``.
        completions: Flat indices of all tokens of completions, completion by completion.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    predictors: Tensor
    ends: Tensor
    completions: Tensor


@dataclass(eq=False)  # not frozen: Lightning's precision plugins refuse frozen dataclasses in a batch
class PackedBatch:
    """Prompt groups in one row: ``prompt, completion 1 … completion k, next prompt …``.

    Lengths live on the host as tuples, so that planning the attention never waits for a device.

    Attributes:
        input_ids: ``(T,)``.
        position_ids: ``(T,)``; every completion continues the positions of its prompt.
        predictors: Positions whose hidden state predicts a target, ``(M,)``, completion by completion.
        targets: The tokens they predict, ``(M,)``: those tokens of completions that count.
        target_lengths: Targets a completion, ``(N,)``, on the device: ``sum_by_sequence(logprobs, target_lengths)``.
        prompt_lengths: Tokens of each prompt, G integers.
        completion_lengths: Tokens of each completion, G tuples.
        num_targets: ``target_lengths`` on the host, N integers.
        row_ids: G integers.
        largest_id: The largest token id, on the host: whether a model has a row for every token.
        extras: Numbers a group, each ``(G,)``.
        ranks: Of the completions within their group, lower is better, ``(N,)``; None where the data does not rank.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    target_lengths: Tensor
    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[tuple[int, ...], ...]
    num_targets: tuple[int, ...]
    row_ids: tuple[int, ...]
    largest_id: int
    extras: dict[str, Tensor] = field(default_factory=dict)
    ranks: Tensor | None = None

    @property
    def num_groups(self) -> int:
        """G, the number of prompts."""
        return len(self.prompt_lengths)

    @property
    def num_completions(self) -> int:
        """N, the number of completions of all groups."""
        return len(self.num_targets)

    def groups(self) -> list[PromptGroup]:
        """The prompt groups again, with masks of what counts; waits for the device."""
        ids, counted = self.input_ids.tolist(), set(zip(*self._counted(), strict=True))
        found: list[PromptGroup] = []
        at = completion = 0
        for g, (prompt, lengths) in enumerate(zip(self.prompt_lengths, self.completion_lengths, strict=True)):
            start, at = at, at + prompt
            completions, masks = [], []
            for length in lengths:
                completions.append(ids[at : at + length])
                masks.append([(completion, prompt + place) in counted for place in range(length)])
                at, completion = at + length, completion + 1
            extras = {name: float(values[g]) for name, values in self.extras.items()}
            found.append(
                PromptGroup(ids[start : start + prompt], completions, masks, self.row_ids[g], extras)
            )
        return found

    def _counted(self) -> tuple[list[int], list[int]]:
        """Of every target, its completion and its position."""
        completions = [k for k, count in enumerate(self.num_targets) for _ in range(count)]
        return completions, (self.position_ids[self.predictors] + 1).tolist()

    @property
    def max_positions(self) -> int:
        """Tokens of the longest prompt + completion."""
        return max(p + max(c) for p, c in zip(self.prompt_lengths, self.completion_lengths, strict=True))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """The batch on another device; lengths stay on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """The batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "PackedBatch":
        moved: dict[str, Any] = {
            f.name: move(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved, extras={name: move(value) for name, value in self.extras.items()})

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The attention's plan, in the order of the row: queries are covered once, without gaps."""
        return self.parts(max(map(len, self.completion_lengths)))[0].segments

    def are_first(self, num_first: int | None) -> list[bool]:
        """For each completion, whether it is one of the first so many of its prompt; for None they all are."""
        numbers = [number for lengths in self.completion_lengths for number in range(len(lengths))]
        return [num_first is None or number < num_first for number in numbers]

    def parts(self, num_first: int) -> tuple[RowPart, RowPart]:
        """The row in two parts: every prompt with its first ``num_first`` completions, and then all the others."""
        first, others, segments = [], [], []
        prompts_of_others: list[tuple[int, int]] = []
        at = start = 0
        for prompt, completions in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            prompt_end = start + prompt
            end = prompt_end + completions[0]
            segments.append(Segment(start, end, start, start))
            for length in completions[1:num_first]:
                segments.append(Segment(end, end + length, start, prompt_end))
                end += length
            first.append(torch.arange(at, at + end - start))
            at += end - start
            for length in completions[num_first:]:
                others.append(torch.arange(at, at + length))
                prompts_of_others.append((start, prompt_end))
                at += length
            start = end
        following = []
        for tokens, prompt_place in zip(others, prompts_of_others, strict=True):
            following.append(Segment(start, start + len(tokens), *prompt_place))
            start += len(tokens)
        nothing = torch.zeros(0, dtype=torch.long)
        return (
            RowPart(torch.cat(first), tuple(segments)),
            RowPart(torch.cat([nothing, *others]), tuple(following)),
        )

    @cached_property
    def ends(self) -> Tensor:
        """Where the last token of each completion stands, ``(N,)``."""
        lengths = [
            n for p, c in zip(self.prompt_lengths, self.completion_lengths, strict=True) for n in (p, *c)
        ]
        is_prompt = [first for c in self.completion_lengths for first in (True, *[False] * len(c))]
        ends = [end - 1 for end, first in zip(accumulate(lengths), is_prompt, strict=True) if not first]
        return torch.tensor(ends, device=self.input_ids.device)

    @cached_property
    def completions(self) -> Tensor:
        """Where the tokens of completions stand, completion by completion."""
        places, start = [], 0
        for prompt, completions in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            end = start + prompt + sum(completions)
            places.append(torch.arange(start + prompt, end))
            start = end
        return torch.cat(places).to(self.input_ids.device)

    def padded(self) -> PaddedBatch:
        """One right-padded row per prompt + completion, from the same tensors."""
        device = self.input_ids.device
        rows, columns, sources = [], [], []
        start = row = 0
        for prompt, completions in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            end = start + prompt
            for length in completions:
                sources.append(
                    torch.cat([torch.arange(start, start + prompt), torch.arange(end, end + length)])
                )
                rows.append(torch.full((prompt + length,), row))
                columns.append(torch.arange(prompt + length))
                end, row = end + length, row + 1
            start = end
        at, column, source = (
            torch.cat(rows).to(device),
            torch.cat(columns).to(device),
            torch.cat(sources).to(device),
        )
        input_ids = torch.zeros(row, self.max_positions, dtype=torch.long, device=device)
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        input_ids[at, column] = self.input_ids[source]
        mask[at, column] = True
        position_ids = torch.arange(self.max_positions, device=device).expand_as(input_ids)
        # A predictor sits at its position in the row of the completion that holds its target.
        lengths = torch.tensor(self.num_targets, device=device)
        row_of_target = torch.repeat_interleave(
            torch.arange(row, device=device), lengths, output_size=sum(self.num_targets)
        )
        predictors = row_of_target * self.max_positions + self.position_ids[self.predictors]
        ends = torch.arange(row, device=device) * self.max_positions + self.position_ids[self.ends]
        sizes = [n for c in self.completion_lengths for n in c]
        row_of_token = torch.repeat_interleave(
            torch.arange(row, device=device), torch.tensor(sizes, device=device), output_size=sum(sizes)
        )
        tokens = row_of_token * self.max_positions + self.position_ids[self.completions]
        return PaddedBatch(input_ids, mask, position_ids, predictors, ends, tokens)


def pack(groups: Iterable[PromptGroup]) -> PackedBatch:
    """Lay prompt groups end to end.

    Args:
        groups: At least one; each with at least one prompt token and at least one completion.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: If there is no group, a prompt or a completion is empty, a mask has the wrong length, or there are
            ranks for some completions only.

    Example:
        >>> batch = pack([PromptGroup(prompt=[5, 6], completions=[[7, 8], [9]])])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([5, 6, 7, 8, 9], [0, 1, 2, 3, 2])
        >>> batch.predictors.tolist(), batch.targets.tolist()
        ([1, 2, 1], [7, 8, 9])
    """
    groups = list(groups)
    if not groups:
        raise ValueError("a batch needs at least one prompt group")
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    num_targets: list[int] = []
    for group in groups:
        _check(group)
        last_of_prompt = len(ids) + len(group.prompt) - 1
        ids.extend(group.prompt)
        positions.extend(range(len(group.prompt)))
        for k, completion in enumerate(group.completions):
            mask = [True] * len(completion) if group.masks is None else group.masks[k]
            before = [last_of_prompt, *range(len(ids), len(ids) + len(completion) - 1)]
            counted = [j for j, counts in enumerate(mask) if counts]
            predictors.extend(before[j] for j in counted)
            targets.extend(completion[j] for j in counted)
            num_targets.append(len(counted))
            positions.extend(range(len(group.prompt), len(group.prompt) + len(completion)))
            ids.extend(completion)
    return PackedBatch(
        input_ids=torch.tensor(ids, dtype=torch.long),
        position_ids=torch.tensor(positions, dtype=torch.long),
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        target_lengths=torch.tensor(num_targets, dtype=torch.long),
        prompt_lengths=tuple(len(group.prompt) for group in groups),
        completion_lengths=tuple(tuple(len(c) for c in group.completions) for group in groups),
        num_targets=tuple(num_targets),
        row_ids=tuple(group.row_id for group in groups),
        largest_id=max(ids),
        extras={
            name: torch.tensor([group.extras[name] for group in groups], dtype=torch.float32)
            for name in groups[0].extras
        },
        ranks=_ranks(groups),
    )


def _ranks(groups: Sequence[PromptGroup]) -> Tensor | None:
    ranked = [group for group in groups if group.ranks is not None]
    if not ranked:
        return None
    if len(ranked) < len(groups):
        raise ValueError("some groups of the batch have ranks and others have none; rank all or none")
    return torch.tensor([rank for group in ranked for rank in group.ranks or ()], dtype=torch.float32)


def _check(group: PromptGroup) -> None:
    if not group.prompt:
        raise ValueError(f"row {group.row_id}: the prompt has no token; give it a start token")
    if not group.completions or not all(len(completion) for completion in group.completions):
        raise ValueError(f"row {group.row_id}: every group needs completions, each with at least one token")
    if group.masks is not None and [len(m) for m in group.masks] != [len(c) for c in group.completions]:
        raise ValueError(f"row {group.row_id}: a mask has another length than its completion")
    if group.ranks is not None and len(group.ranks) != len(group.completions):
        raise ValueError(
            f"row {group.row_id}: {len(group.ranks)} ranks for {len(group.completions)} completions"
        )
