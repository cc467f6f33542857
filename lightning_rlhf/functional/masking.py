"""Statistics over the positions where a mask is True."""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    r"""Mean of the values that count: $\sum_i m_i x_i / \sum_i m_i$.

    Args:
        values: Any shape, any floating dtype.
        mask: Boolean, broadcastable to ``values``; True where a value counts. Values where it is False may be
            anything, nan and infinities included: they are never multiplied, only left out.
        dim: The dimension to reduce; all of them by default.

    Returns:
        The mean, without the reduced dimension. A slice in which nothing counts has mean 0.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, float("-inf")]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    mask = mask.expand_as(values)
    kept = torch.where(mask, values, 0.0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = True) -> Tensor:
    r"""Variance of the values that count, around their mean.

    Args:
        values: Any shape.
        mask: Boolean, broadcastable to ``values``; True where a value counts.
        unbiased: Divide by $n - 1$ (Bessel's correction) instead of $n$.

    Returns:
        A scalar.

    Raises:
        ValueError: If fewer values count than the estimate needs (two, or one where biased).

    Example:
        >>> masked_var(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    mask = mask.expand_as(values)
    count = mask.sum()
    needed = 2 if unbiased else 1
    if count < needed:
        raise ValueError(f"the variance needs at least {needed} values under the mask, got {int(count)}")
    centred = torch.where(mask, values - masked_mean(values, mask), 0.0)
    return centred.square().sum() / (count - 1 if unbiased else count)


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    r"""Scale the values that count to standard deviation 1, and by default to mean 0.

    $y_i = (x_i - \mu) / \sqrt{\sigma^2 + 10^{-8}}$, plus $\mu$ where the mean is kept.

    Args:
        values: Any shape.
        mask: Boolean, broadcastable to ``values``; True where a value counts.
        shift_mean: Move the mean to 0; else the mean stays what it was.

    Returns:
        The shape of ``values``; 0 where the mask is False.

    Example:
        >>> masked_whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask.expand_as(values), whitened, 0.0)
