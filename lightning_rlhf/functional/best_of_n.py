"""Best-of-n sampling: what the best of n samples by a proxy costs in KL, and what it is worth."""

import math

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_finite, require_same_shape


def best_of_n_kl(n: int) -> float:
    r"""KL of the best of n samples from one sample, $\ln n - (n - 1)/n$, in nats.

    Appendix G.3 of Stiennon et al. (2020); an upper bound where completions may repeat (Beirami et al., 2024).

    Args:
        n: Samples, at least 1.

    Returns:
        Nats; 0 for n = 1.

    Raises:
        ValueError: If n is less than 1.

    Example:
        >>> round(best_of_n_kl(16), 4)
        1.8351
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_expectation(proxy: Tensor, gold: Tensor, n: int) -> Tensor:
    r"""Expected gold reward of the best of n by the proxy, without bias, from N ≥ n samples.

    $\sum_{i=n}^{N} \binom{i-1}{n-1} / \binom{N}{n} \; g_{(i)}$ with the samples sorted by the proxy, ascending: each
    set of n is as likely, and sample i is the best of $\binom{i-1}{n-1}$ of them. The estimator of appendix I of
    Nakano et al. (2021), "WebGPT", which Gao et al. (2023) use. Among samples of equal proxy the choice is free, so
    each has the mean of their gold.

    Args:
        proxy: What the best is chosen by, ``(…, N)``: samples of one prompt in the last dimension.
        gold: What it is worth, of the same shape.
        n: Samples to choose from, at most N.

    Returns:
        ``(…,)``, float64.

    Raises:
        ValueError: If n is out of range, the shapes differ or a value is not finite.

    Example:
        >>> best_of_n_expectation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 3.0, 6.0]), 2)
        tensor(5., dtype=torch.float64)
    """
    require_same_shape("proxy", proxy, "gold", gold)
    count = proxy.shape[-1]
    if not 1 <= n <= count:
        raise ValueError(f"n must be between 1 and the number of samples ({count}), got {n}")
    require_finite("proxy", proxy)
    require_finite("gold", gold)
    ordered, order = proxy.sort(-1)
    sorted_gold = _mean_of_ties(ordered, gold.double().gather(-1, order))
    # From the best down: n/N, then each times (i − n)/(i − 1) for the place i above it; 0 below place n.
    above = torch.arange(count, n, -1, dtype=torch.float64, device=proxy.device)
    weights = torch.cat([above.new_full((1,), n / count), (above - n) / (above - 1)]).cumprod(0)
    return (sorted_gold.flip(-1)[..., : len(weights)] * weights).sum(-1)


def _mean_of_ties(ordered: Tensor, values: Tensor) -> Tensor:
    """Each value as the mean of those whose key, of sorted keys, is the same."""
    starts = torch.ones_like(ordered, dtype=torch.long)
    starts[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).long()
    tie = starts.cumsum(-1) - 1
    zeros = torch.zeros_like(values)
    totals = zeros.scatter_add(-1, tie, values)
    counts = zeros.scatter_add(-1, tie, torch.ones_like(values))
    return totals.gather(-1, tie) / counts.gather(-1, tie)
