"""Losses over the scores of ranked completions, and what several reward models together say."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None
) -> Tensor:
    r"""Negative log-likelihood of a preference under Bradley and Terry (1952): $-\log \sigma(s_w - s_l - m)$.

    Equation 1 of Stiennon et al. (2020) and of Ouyang et al. (2022); the margin is equation 2 of Touvron et al. (2023,
    Llama 2).

    Args:
        chosen_scores: Scores of the preferred completions, ``(N,)``.
        rejected_scores: Those of the others, ``(N,)``.
        margin: By how much the preferred one should lead, ``(N,)``, in units of the score; None for 0.

    Returns:
        One loss per comparison, ``(N,)``: ln 2 for equal scores without a margin.

    Example:
        >>> bradley_terry_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
        tensor([0.6931, 0.3133])
        >>> bradley_terry_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]))
        tensor([0.6931])
    """
    lead = chosen_scores - rejected_scores
    return -F.logsigmoid(lead if margin is None else lead - margin)


class Comparisons(NamedTuple):
    """All comparisons within the groups of a batch.

    Attributes:
        better: Index of the preferred completion, ``(C,)``.
        worse: Index of the other one, ``(C,)``.
        counts: 1 where the two differ in rank, 0 for a tie, ``(C,)``, float32.
        sizes: Comparisons a group, ties included, ``(G,)``.
    """

    better: Tensor
    worse: Tensor
    counts: Tensor
    sizes: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """The mean of one value per comparison within each group, ``(G,)``, ties left out; 0 where all tie."""
        total = torch.segment_reduce(values * self.counts, "sum", lengths=self.sizes, initial=0.0)
        counted = torch.segment_reduce(self.counts, "sum", lengths=self.sizes, initial=0.0)
        return total / counted.clamp(min=1.0)


def comparisons(group_sizes: Sequence[int], ranks: Tensor) -> Comparisons:
    """Pair every completion of a group with every other one of it.

    Args:
        group_sizes: Completions of each prompt, G integers on the host.
        ranks: Lower is better, ``(N,)``; equal ranks are a tie.

    Returns:
        K·(K−1)/2 comparisons for a group of K, on the device of ``ranks``; nothing waits for the device.

    Raises:
        ValueError: If the group sizes do not add up to the number of ranks.

    Example:
        >>> found = comparisons([3], torch.tensor([1.0, 0.0, 1.0]))
        >>> found.better.tolist(), found.worse.tolist(), found.counts.tolist()
        ([1, 0, 1], [0, 2, 2], [1.0, 0.0, 1.0])
    """
    if sum(group_sizes) != len(ranks):
        raise ValueError(f"groups of {sum(group_sizes)} completions, but {len(ranks)} ranks")
    pairs: list[tuple[int, int]] = []
    sizes: list[int] = []
    start = 0
    for size in group_sizes:
        found = list(combinations(range(start, start + size), 2))
        pairs += found
        sizes.append(len(found))
        start += size
    first, second = torch.tensor(pairs, dtype=torch.long, device=ranks.device).reshape(-1, 2).unbind(1)
    swap = ranks[second] < ranks[first]
    return Comparisons(
        better=torch.where(swap, second, first),
        worse=torch.where(swap, first, second),
        counts=(ranks[first] != ranks[second]).float(),
        sizes=torch.tensor(sizes, device=ranks.device),
    )


def ensemble_mean(scores: Tensor) -> Tensor:
    """The mean of the members' scores.

    Args:
        scores: ``(members, N)``.

    Returns:
        ``(N,)``.

    Example:
        >>> ensemble_mean(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        tensor([2., 2.])
    """
    return scores.mean(0)


def ensemble_worst_case(scores: Tensor) -> Tensor:
    r"""The lowest of the members' scores, $\min_i r_i$: equation 4 of Coste et al. (2023).

    Args:
        scores: ``(members, N)``.

    Returns:
        ``(N,)``.

    Example:
        >>> ensemble_worst_case(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        tensor([1., 2.])
    """
    return scores.amin(0)


def ensemble_uncertainty_weighted(scores: Tensor, *, coef: float) -> Tensor:
    r"""Mean minus disagreement, $\bar r - \lambda \frac{1}{k} \sum_i (r_i - \bar r)^2$: equation 5 of Coste et al.

    Args:
        scores: ``(members, N)``.
        coef: λ, at least 0.

    Returns:
        ``(N,)``.

    Raises:
        ValueError: If ``coef`` is negative.

    Example:
        >>> ensemble_uncertainty_weighted(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), coef=0.5)
        tensor([1.5000, 2.0000])
    """
    if coef < 0:
        raise ValueError(f"coef must be at least 0, got {coef}")
    return scores.mean(0) - coef * scores.var(0, correction=0)
