"""How far a proxy reward has left the gold reward that it stands for."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_finite, require_same_shape

__all__ = ["GoodhartEstimate", "goodhart_gap"]


class GoodhartEstimate(NamedTuple):
    """Gaps between proxy and gold, in standard deviations of the starting policy's samples; scalars, float64.

    Attributes:
        proxy: Mean standardised proxy.
        gold: Mean standardised gold.
        gap: z_proxy − z_gold.
        gap_lower: Lower end of its interval.
        gap_upper: Upper end.
        excess_gap: ρ₀ z_proxy − z_gold.
        excess_gap_lower: Lower end of its interval.
        excess_gap_upper: Upper end.
        correlation: ρ₀, that of proxy and gold on the starting policy's samples.
    """

    proxy: Tensor
    gold: Tensor
    gap: Tensor
    gap_lower: Tensor
    gap_upper: Tensor
    excess_gap: Tensor
    excess_gap_lower: Tensor
    excess_gap_upper: Tensor
    correlation: Tensor


def goodhart_gap(
    proxy: Tensor,
    gold: Tensor,
    reference_proxy: Tensor,
    reference_gold: Tensor,
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> GoodhartEstimate:
    r"""The raw and the excess gap between proxy and gold, each with a bootstrap interval.

    Both rewards are standardised by mean and standard deviation on samples of the starting policy, where $\rho_0$ is
    their correlation. The raw gap is $\bar z_{proxy} - \bar z_{gold}$. It grows by $(1 - \rho_0) \bar z_{proxy}$ from
    the first step of any selection by the proxy, which is regression to the mean and no over-optimisation. The excess
    gap $\rho_0 \bar z_{proxy} - \bar z_{gold}$ is 0 as long as gold follows the proxy as it did at the start.

    The intervals are percentiles over resamples of the samples and, independently, of the starting policy's samples
    (Efron, 1979). Where both are of the same prompts they are a little too wide.

    Args:
        proxy: Of samples of the policy, ``(N,)``.
        gold: Of the same samples, ``(N,)``.
        reference_proxy: Of samples of the starting policy, ``(M,)``, M ≥ 2.
        reference_gold: Of the same samples, ``(M,)``.
        confidence: Share of such intervals that hold the true value, in (0, 1).
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap: the same samples give the same interval.

    Returns:
        The gaps, their intervals, and what they are made of.

    Raises:
        ValueError: If shapes or ranges are wrong, there are too few samples, or a reward does not vary on the
            starting policy's samples.

    Example:
        >>> start = torch.tensor([-1.0, 0.0, 1.0])
        >>> found = goodhart_gap(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 1.0]), start, start)
        >>> found.proxy, found.gold, found.gap, found.excess_gap
        (tensor(3., dtype=torch.float64), tensor(1., dtype=torch.float64),
         tensor(2., dtype=torch.float64), tensor(2., dtype=torch.float64))
    """
    _check(proxy, gold, reference_proxy, reference_gold, confidence, num_resamples)
    samples = torch.stack([proxy, gold]).detach().double().cpu()
    reference = torch.stack([reference_proxy, reference_gold]).detach().double().cpu()
    for name, row in zip(("reference_proxy", "reference_gold"), reference, strict=True):
        if row.std() <= 1e-12 * row.mean().abs():
            raise ValueError(
                f"{name} is {row[0].item():.6g} for all {len(row)} samples of the starting policy, so that nothing can "
                "be standardised by it: sample more prompts, or use a reward that varies"
            )
    z, gaps, correlation = _gaps(samples[None], reference[None])
    generator = torch.Generator().manual_seed(seed)
    resampled = torch.cat(
        [
            _gaps(_resample(samples, count, generator), _resample(reference, count, generator))[1]
            for count in _chunks(num_resamples, samples.shape[1] + reference.shape[1])
        ]
    )
    tail = (1 - confidence) / 2
    ends = torch.nanquantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    (low, excess_low), (high, excess_high) = ends
    return GoodhartEstimate(
        z[0, 0], z[0, 1], gaps[0, 0], low, high, gaps[0, 1], excess_low, excess_high, correlation[0]
    )


def _gaps(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means z (R, 2), raw and excess gap (R, 2), and ρ₀ (R,) of samples (R, 2, N) and those at the start (R, 2, M)."""
    mean = reference.mean(-1, keepdim=True)
    centred = reference - mean
    squares = centred.square().sum(-1)
    z = (samples.mean(-1) - mean[..., 0]) / (squares / (reference.shape[-1] - 1)).sqrt()
    correlation = (centred[:, 0] * centred[:, 1]).sum(-1) / squares.prod(-1).sqrt()
    gaps = torch.stack([z[:, 0] - z[:, 1], correlation * z[:, 0] - z[:, 1]], dim=1)
    # A resample in which a reward is constant says nothing: nanquantile leaves it out.
    return z, gaps.where(gaps.isfinite(), torch.nan), correlation


def _resample(samples: Tensor, count: int, generator: torch.Generator) -> Tensor:
    size = samples.shape[1]
    places = torch.randint(size, (count, size), generator=generator)
    return samples[:, places].transpose(0, 1)


def _chunks(total: int, width: int, budget: int = 2_000_000) -> list[int]:
    """How many resamples at a time, so that no more than a budget of numbers is held."""
    size = max(1, budget // width)
    return [min(size, total - done) for done in range(0, total, size)]


def _check(
    proxy: Tensor, gold: Tensor, reference_proxy: Tensor, reference_gold: Tensor, confidence: float, num: int
) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    if num < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num}")
    require_same_shape("proxy", proxy, "gold", gold)
    require_same_shape("reference_proxy", reference_proxy, "reference_gold", reference_gold)
    named = {
        "proxy": proxy,
        "gold": gold,
        "reference_proxy": reference_proxy,
        "reference_gold": reference_gold,
    }
    for name, values in named.items():
        if values.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(values.shape)}: give one value per sample, (N,)")
        require_finite(name, values)
    if not len(proxy) or len(reference_proxy) < 2:
        raise ValueError(
            f"{len(proxy)} samples and {len(reference_proxy)} of the starting policy are too few: at least 1 and 2"
        )
