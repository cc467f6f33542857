"""Whether two quantities have the same order."""

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_finite, require_same_shape
from lightning_rlhf.functional.moments import correlation_of_moments, moments

__all__ = ["kendall_correlation", "spearman_correlation"]


def spearman_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation: Pearson's of the ranks, where equal values share their mean rank.

    Spearman (1904), "The Proof and Measurement of Association between Two Things".

    Args:
        x: ``(N,)``.
        y: ``(N,)``.

    Returns:
        A scalar in [−1, 1], float64; nan below two values and where one of the two does not vary.

    Raises:
        ValueError: If shapes differ or a value is not finite.

    Example:
        >>> spearman_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 8.0, 9.0]))
        tensor(1.0000, dtype=torch.float64)
    """
    _check(x, y)
    return correlation_of_moments(moments(mean_ranks(x), mean_ranks(y)))


def kendall_correlation(x: Tensor, y: Tensor) -> Tensor:
    r"""Kendall's τ_b: of the pairs, those in the same order less those in the opposite one.

    $\sum_{i<j} \mathrm{sgn}(x_i - x_j)\,\mathrm{sgn}(y_i - y_j) / \sqrt{P_x P_y}$ with $P$ the pairs that are no tie:
    Kendall (1945), "The treatment of ties in ranking problems". Compares all pairs: N² numbers.

    Args:
        x: ``(N,)``.
        y: ``(N,)``.

    Returns:
        A scalar in [−1, 1], float64; nan below two values and where one of the two does not vary.

    Raises:
        ValueError: If shapes differ or a value is not finite.

    Example:
        >>> kendall_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0]))
        tensor(0.3333, dtype=torch.float64)
    """
    _check(x, y)
    of_x, of_y = (torch.sign(v[:, None] - v[None, :]).double() for v in (x, y))
    return (of_x * of_y).sum() / (of_x.abs().sum() * of_y.abs().sum()).sqrt()


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of their places. float64.

    Example:
        >>> mean_ranks(torch.tensor([5.0, 1.0, 5.0]))
        tensor([1.5000, 0.0000, 1.5000], dtype=torch.float64)
    """
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[place]


def _check(x: Tensor, y: Tensor) -> None:
    require_same_shape("x", x, "y", y)
    if x.dim() != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: give one value per row, (N,)")
    require_finite("x", x)
    require_finite("y", y)
