"""How far a measured share may be from the true one."""

from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["newcombe_interval", "wilson_interval"]


def wilson_interval(
    successes: Tensor | float, total: Tensor | float, *, confidence: float = 0.95
) -> tuple[Tensor, Tensor]:
    r"""Wilson's score interval of a share, such as an accuracy.

    $\frac{k + z^2/2}{n + z^2} \pm \frac{z}{n + z^2} \sqrt{\frac{k (n - k)}{n} + \frac{z^2}{4}}$, with $z$ the normal
    quantile of $(1 + c) / 2$: Wilson (1927), "Probable inference, the law of succession, and statistical
    inference". Unlike $\hat p \pm z\,\mathrm{se}$ it stays within [0, 1] and does not shrink to nothing at 0 or n
    successes. Ties that count one half vary less than the interval supposes: it is then a little too wide.

    Args:
        successes: k, how many; any shape.
        total: n, out of how many; broadcasts with ``successes``. The interval of nothing seen is [0, 1].
        confidence: c, the share of such intervals that hold the true share, in (0, 1).

    Returns:
        Lower and upper end, float64.

    Raises:
        ValueError: If ``confidence`` is out of range, or ``successes`` is not between 0 and ``total``.

    Example:
        >>> lower, upper = wilson_interval(8, 10)
        >>> print(f"{lower:.3f} {upper:.3f}")
        0.490 0.943
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    n = torch.as_tensor(total, dtype=torch.float64)
    k = torch.as_tensor(successes, dtype=torch.float64, device=n.device)
    if not ((k >= 0) & (k <= n)).all():
        raise ValueError(f"successes must lie between 0 and total, got {successes} of {total}")
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    centre = (k + z**2 / 2) / (n + z**2)
    # At n = 0 the variance k (n - k) / n is 0: nothing varies where nothing was seen.
    half = z * torch.sqrt(k * (n - k) / n.clamp(min=1e-9) + z**2 / 4) / (n + z**2)
    return (centre - half).clamp(min=0.0), (centre + half).clamp(max=1.0)


def newcombe_interval(
    successes: Tensor | float,
    total: Tensor | float,
    reference_successes: Tensor | float,
    reference_total: Tensor | float,
    *,
    confidence: float = 0.95,
) -> tuple[Tensor, Tensor]:
    r"""Interval of the difference of two independent shares, $p - p_0$, from Wilson's interval of each.

    $(p - p_0) - \sqrt{(p - l)^2 + (u_0 - p_0)^2}$ and $(p - p_0) + \sqrt{(u - p)^2 + (p_0 - l_0)^2}$: method 10 of
    Newcombe (1998), "Interval estimation for the difference between independent proportions". For shares of the same
    prompts, which vary together, it is a little too wide.

    Args:
        successes: How many, any shape.
        total: Out of how many.
        reference_successes: How many of what is compared with.
        reference_total: Out of how many.
        confidence: Share of such intervals that hold the true difference, in (0, 1).

    Returns:
        Lower and upper end, float64; nan where either total is 0.

    Raises:
        ValueError: If ``confidence`` is out of range, or successes are not between 0 and their total.

    Example:
        >>> lower, upper = newcombe_interval(56, 70, 48, 80)
        >>> print(f"{lower:.4f} {upper:.4f}")
        0.0524 0.3339
    """
    lower, upper = wilson_interval(successes, total, confidence=confidence)
    ref_lower, ref_upper = wilson_interval(reference_successes, reference_total, confidence=confidence)
    share = torch.as_tensor(successes, dtype=torch.float64) / torch.as_tensor(total, dtype=torch.float64)
    ref_share = torch.as_tensor(reference_successes, dtype=torch.float64) / torch.as_tensor(
        reference_total, dtype=torch.float64
    )
    down = torch.hypot(share - lower, ref_upper - ref_share)
    up = torch.hypot(upper - share, ref_share - ref_lower)
    return share - ref_share - down, share - ref_share + up
