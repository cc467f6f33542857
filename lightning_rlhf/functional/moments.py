"""Count, mean and scatter, kept so that parts merge into the whole without cancellation.

They travel as one vector of 1 + D + D² numbers: the count, the means, and the sums of products of deviations.
"""

import math

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_finite

__all__ = [
    "correlation_of_moments",
    "mean_and_std",
    "mean_and_std_of_moments",
    "merge_moments",
    "moments",
    "regression_of_moments",
]

# Relative spread below which values are the same number, rounded: float32 values that differ do so by 1e-7.
_CONSTANT = 1e-12


def moments(*columns: Tensor) -> Tensor:
    r"""Count, means and scatter $\sum_i (x_i - \bar x)(x_i - \bar x)^T$ of rows.

    Args:
        columns: D tensors of one shape, with N values each.

    Returns:
        ``(1 + D + D²,)``, float64; zeros without rows. A value that is not finite makes them nan.

    Example:
        >>> moments(torch.tensor([1.0, 3.0]))
        tensor([2., 2., 2.], dtype=torch.float64)
    """
    values = torch.stack([column.detach().reshape(-1).double() for column in columns], dim=1)
    count = values.new_full((1,), values.shape[0])  # unlike new_tensor, without waiting for the device
    mean = values.sum(0) / max(values.shape[0], 1)
    centred = values - mean
    return torch.cat([count, mean, (centred.T @ centred).reshape(-1)])


def merge_moments(parts: Tensor) -> Tensor:
    r"""The moments of the whole from those of its parts.

    $n \bar x = \sum_p n_p \bar x_p$ and $S = \sum_p S_p + n_p (\bar x_p - \bar x)(\bar x_p - \bar x)^T$: equations
    2.1 of Chan, Golub and LeVeque (1979), "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", for any number of parts. Sums of squares instead would cancel where the mean is large.

    Args:
        parts: One vector of :func:`moments` per part, ``(P, 1 + D + D²)``.

    Returns:
        ``(1 + D + D²,)``, float64.

    Example:
        >>> merge_moments(torch.stack([moments(torch.tensor([1.0])), moments(torch.tensor([3.0]))]))
        tensor([2., 2., 2.], dtype=torch.float64)
    """
    counts, means, scatters = _split(parts)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    shift = means - mean
    between = torch.einsum("p,pi,pj->ij", counts[:, 0], shift, shift)
    return torch.cat([count, mean, (scatters.sum(0) + between).reshape(-1)])


def mean_and_std_of_moments(whole: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the columns.

    Args:
        whole: A vector of :func:`moments`, ``(1 + D + D²,)``.

    Returns:
        Two ``(D,)``; the mean is nan without rows, the deviation (n − 1 in its denominator) below two rows.

    Example:
        >>> mean_and_std_of_moments(moments(torch.tensor([1.0, 3.0])))
        (tensor([2.], dtype=torch.float64), tensor([1.4142], dtype=torch.float64))
    """
    counts, means, scatters = _split(whole[None])
    variance = scatters[0].diagonal() / (counts[0] - 1).clamp(min=0)
    return torch.where(counts[0] > 0, means[0], torch.nan), variance.sqrt()


def correlation_of_moments(whole: Tensor) -> Tensor:
    r"""Pearson's correlation of two columns, $S_{xy} / \sqrt{S_{xx} S_{yy}}$.

    Args:
        whole: The moments of two columns, ``(7,)``.

    Returns:
        A scalar in [-1, 1]; nan below two rows and where a column is constant.

    Example:
        >>> correlation_of_moments(moments(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])))
        tensor(-1.0000, dtype=torch.float64)
    """
    counts, means, scatters = _split(whole[None])
    squares = scatters[0].diagonal()
    constant = (squares <= counts[0] * (_CONSTANT * means[0]) ** 2).any()
    value = (scatters[0, 0, 1] / squares.sqrt().prod()).clamp(-1.0, 1.0)
    return torch.where(constant, torch.nan, value)


def regression_of_moments(whole: Tensor) -> tuple[Tensor, Tensor]:
    r"""The line through two columns by least squares, $y \approx a + b x$ with $b = S_{xy} / S_{xx}$.

    Args:
        whole: The moments of y and x, in this order, ``(7,)``.

    Returns:
        Intercept a and slope b, two scalars, float64; nan below two rows and where x is constant.

    Example:
        >>> regression_of_moments(moments(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0])))
        (tensor(1., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    counts, means, scatters = _split(whole[None])
    constant = scatters[0, 1, 1] <= counts[0, 0] * (_CONSTANT * means[0, 1]) ** 2
    slope = torch.where(constant, torch.nan, scatters[0, 0, 1] / scatters[0, 1, 1])
    return means[0, 0] - slope * means[0, 1], slope


def mean_and_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread, such as those of a reward model's margins.

    Args:
        values: Any shape.

    Returns:
        Mean and sample standard deviation (n − 1), two scalars, float64. The mean is nan without values, the
        deviation below two.

    Raises:
        ValueError: If a value is not finite.

    Example:
        >>> mean_and_std(torch.tensor([1.0, 3.0]))
        (tensor(2., dtype=torch.float64), tensor(1.4142, dtype=torch.float64))
    """
    require_finite("values", values)
    mean, std = mean_and_std_of_moments(moments(values))
    return mean[0], std[0]


def _split(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (P, 1), means (P, D) and scatters (P, D, D) of packed moments."""
    columns = (math.isqrt(4 * parts.shape[1] - 3) - 1) // 2
    counts, means, scatters = parts.split([1, columns, columns**2], dim=1)
    return counts, means, scatters.reshape(-1, columns, columns)
