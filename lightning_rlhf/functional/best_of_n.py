"""Best-of-n sampling: what the best of n samples by a proxy costs in KL, and what it is worth."""

import math
from typing import NamedTuple

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


class BestOfNCurve(NamedTuple):
    """What the best of n by a proxy is worth, for n = 1, 2, 4 … N: a row each, ``(T,)``, float64.

    Attributes:
        n: Samples to choose from.
        kl: The most it costs, :func:`best_of_n_kl`, in nats.
        proxy: Mean proxy reward of the chosen sample, over prompts.
        gold: Mean gold reward of it.
        proxy_error: Standard error of ``proxy`` over prompts; nan for a single one. Rows share their samples.
        gold_error: That of ``gold``.
    """

    n: Tensor
    kl: Tensor
    proxy: Tensor
    gold: Tensor
    proxy_error: Tensor
    gold_error: Tensor


def best_of_n_curve(proxy: Tensor, gold: Tensor) -> BestOfNCurve:
    """:func:`best_of_n_expectation` of both rewards for n = 1, 2, 4 … N, from one batch of N samples a prompt.

    Args:
        proxy: What the best is chosen by, ``(P, N)``: N samples of each of P prompts.
        gold: What it is worth, of the same shape.

    Returns:
        The curve.

    Raises:
        ValueError: If the shapes differ or are not ``(P, N)``, or a value is not finite.

    Example:
        >>> proxy = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]])
        >>> curve = best_of_n_curve(proxy, -proxy)
        >>> curve.n.tolist(), [round(value, 4) for value in curve.proxy.tolist()], round(curve.gold[-1].item(), 4)
        ([1.0, 2.0, 3.0], [1.5, 2.3333, 3.0], -3.0)
    """
    require_same_shape("proxy", proxy, "gold", gold)
    if proxy.dim() != 2 or not proxy.numel():
        raise ValueError(
            f"proxy must be (prompts, samples) with at least one of each, got {tuple(proxy.shape)}"
        )
    prompts, total = proxy.shape
    sizes = [2**i for i in range(total.bit_length()) if 2**i < total] + [total]
    chosen = torch.stack(
        [torch.stack([best_of_n_expectation(proxy, values, n) for values in (proxy, gold)]) for n in sizes]
    )  # (T, 2, P)
    means, errors = chosen.mean(-1), chosen.std(-1, correction=1) / prompts**0.5
    n = torch.tensor(sizes, dtype=torch.float64)
    kl = torch.tensor([best_of_n_kl(size) for size in sizes], dtype=torch.float64)
    return BestOfNCurve(n, kl, means[:, 0], means[:, 1], errors[:, 0], errors[:, 1])


def _mean_of_ties(ordered: Tensor, values: Tensor) -> Tensor:
    """Each value as the mean of those whose key, of sorted keys, is the same."""
    starts = torch.ones_like(ordered, dtype=torch.long)
    starts[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).long()
    tie = starts.cumsum(-1) - 1
    zeros = torch.zeros_like(values)
    totals = zeros.scatter_add(-1, tie, values)
    counts = zeros.scatter_add(-1, tie, torch.ones_like(values))
    return totals.gather(-1, tie) / counts.gather(-1, tie)
