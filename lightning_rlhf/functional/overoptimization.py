"""The curve of the gold reward over the distance from the starting policy, and where it peaks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_finite, require_same_shape
from lightning_rlhf.functional.student_t import student_t_quantile

__all__ = ["OveroptimizationFit", "fit_overoptimization"]

Method = Literal["rl", "best_of_n"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class OveroptimizationFit:
    r"""A fitted curve of the gold reward over $d = \sqrt{KL(\pi \| \pi_0)}$, in √nats.

    Attributes:
        method: The form that was fitted.
        start: The gold reward at d = 0.
        alpha: α, gold reward per √nat.
        beta: β; the gold reward has a peak only where it is positive.
        peak: d*, in √nats; infinite without a peak, 0 where the curve falls from the start.
        alpha_interval: Lower and upper end of α's interval.
        beta_interval: That of β.
        peak_interval: That of d*; its upper end is infinite where the data do not exclude that there is no peak.
        max_kl: The largest KL of the data: a peak beyond it is an extrapolation.
    """

    method: Method
    start: float
    alpha: float
    beta: float
    peak: float
    alpha_interval: Interval
    beta_interval: Interval
    peak_interval: Interval
    max_kl: float

    @property
    def peak_kl(self) -> float:
        """KL at the peak, d*², in nats; infinite without a peak."""
        return self.peak**2

    @property
    def peak_kl_interval(self) -> Interval:
        """Its interval."""
        return self.peak_interval[0] ** 2, self.peak_interval[1] ** 2

    def kl_left(self, kl: float) -> float:
        """KL left from a current one to the peak, in nats; negative beyond the peak, infinite without one."""
        return self.peak_kl - kl

    def predict(self, kl: Tensor) -> Tensor:
        """The gold reward at some KL, of the same shape, float64."""
        d = kl.double().sqrt()
        return self.start + self.alpha * d + self.beta * _SECOND[self.method](d)

    def describe(self) -> str:
        """One sentence for a person: where the peak is, or that there is none."""
        low, high = self.peak_kl_interval
        if math.isinf(self.peak):
            return (
                f"no peak: β = {self.beta:.3g} is not positive, so the fitted gold reward does not turn down "
                f"(interval of β {_shown(self.beta_interval)})"
            )
        seen = "" if self.peak_kl <= self.max_kl else f", beyond the data, which end at {self.max_kl:.3g}"
        return f"peak at KL {self.peak_kl:.3g} nats (interval {_shown((low, high))}){seen}"


# What β multiplies: R = α d + β · second(d).
_SECOND: dict[str, Callable[[Tensor], Tensor]] = {
    "best_of_n": lambda d: -d.square(),
    "rl": lambda d: -torch.xlogy(d, d),
}


def fit_overoptimization(
    kl: Tensor,
    gold: Tensor,
    *,
    method: Method = "rl",
    start: float | None = None,
    standard_errors: Tensor | None = None,
    confidence: float = 0.95,
) -> OveroptimizationFit:
    r"""Fit the curve of over-optimisation of Gao et al. (2023), section 3, by linear least squares in float64.

    With $d = \sqrt{KL}$: for RL $R(d) = d (\alpha - \beta \ln d)$, whose peak is at $d^* = e^{\alpha/\beta - 1}$; for
    best-of-n $R(d) = d (\alpha - \beta d)$ with $d^* = \alpha / 2\beta$. The gold reward less its value at the start
    is regressed on $[d, -d \ln d]$ or $[d, -d^2]$.

    The intervals are exact for independent Gaussian noise, so that no bootstrap is needed: Student's t for α and β
    (the normal where the standard errors are known), and Fieller's theorem (1954) for α/β, of which d* is an
    increasing function. Points of one training run share its history, which these intervals know nothing of.

    Args:
        kl: KL(π‖π₀) of each point, in nats, ``(N,)``, not negative.
        gold: Mean gold reward of each point, ``(N,)``.
        method: ``rl`` or ``best_of_n``.
        start: The gold reward of the starting policy, where it is known exactly: 0 for a reward that is centred so.
            By default it is estimated as a third unknown, since a measured start has noise that all centred points
            would share.
        standard_errors: Of ``gold``, ``(N,)``, positive: points are weighted by them, and the noise is taken to be
            these. By default all points weigh the same, and the scatter around the curve says how large the noise is.
        confidence: Share of such intervals that hold the true value, in (0, 1).

    Returns:
        The fit. Where β ≤ 0 there is no peak: ``peak`` and ``peak_kl`` are infinite, and ``describe()`` says so.

    Raises:
        ValueError: If shapes or ranges are wrong, or there are too few different points to fit.

    Example:
        >>> d = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
        >>> fit = fit_overoptimization(d**2, 7 + d * (2 - 0.5 * d), method="best_of_n")
        >>> print(f"{fit.alpha:.3f} {fit.beta:.3f} {fit.peak_kl:.3f} {fit.kl_left(1.0):.3f}")
        2.000 0.500 4.000 3.000
        >>> print(fit_overoptimization(d**2, d + d**2, method="best_of_n").describe())
        no peak: β = -1 is not positive, so the fitted gold reward does not turn down (interval of β [-1, -1])
    """
    _check(kl, gold, method, standard_errors, confidence)
    d = kl.detach().double().cpu().sqrt()
    y = gold.detach().double().cpu() - (start or 0.0)
    columns = [d, _SECOND[method](d)] + ([torch.ones_like(d)] if start is None else [])
    design = torch.stack(columns, dim=1)
    _check_points(design, standard_errors is not None)
    coefficients, covariance, critical = _least_squares(design, y, standard_errors, confidence)
    alpha, beta = coefficients[:2].tolist()
    halves = (critical * covariance.diagonal().clamp(min=0).sqrt()).tolist()
    low, high = _fieller(alpha, beta, (critical**2 * covariance[:2, :2]).tolist())
    return OveroptimizationFit(
        method=method,
        start=coefficients[2].item() if start is None else start,
        alpha=alpha,
        beta=beta,
        peak=_peak(alpha / beta, method) if beta > 0 else math.inf,
        alpha_interval=(alpha - halves[0], alpha + halves[0]),
        beta_interval=(beta - halves[1], beta + halves[1]),
        peak_interval=(_peak(low, method), _peak(high, method)),
        max_kl=kl.max().item(),
    )


def _check(kl: Tensor, gold: Tensor, method: str, errors: Tensor | None, confidence: float) -> None:
    if method not in _SECOND:
        raise ValueError(f"method must be rl or best_of_n, got {method!r}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    require_same_shape("kl", kl, "gold", gold)
    require_finite("kl", kl)
    require_finite("gold", gold)
    if (kl < 0).any():
        raise ValueError(
            f"kl is {kl.min().item():.3g} at its lowest, and a KL is not negative: estimate it by k3, or with the "
            "vocabulary summed out"
        )
    if errors is not None:
        require_same_shape("standard_errors", errors, "gold", gold)
        require_finite("standard_errors", errors)
        if not (errors > 0).all():
            raise ValueError(f"standard_errors must be positive, got {errors.min().item()}")


def _check_points(design: Tensor, known: bool) -> None:
    unknowns = design.shape[1]
    needed = unknowns if known else unknowns + 1
    if design.shape[0] < needed:
        raise ValueError(f"{design.shape[0]} points are too few for this fit: give at least {needed}")
    if torch.linalg.matrix_rank(design) < unknowns:
        raise ValueError(f"kl takes too few different values: give at least {unknowns} that differ")


def _least_squares(
    design: Tensor, y: Tensor, errors: Tensor | None, confidence: float
) -> tuple[Tensor, Tensor, float]:
    """Coefficients, their covariance, and by how many standard errors an interval reaches."""
    level = (1 + confidence) / 2
    weights = torch.ones_like(y) if errors is None else 1 / errors.detach().double().cpu()
    scaled, target = design * weights[:, None], y * weights
    inverse = torch.linalg.pinv(scaled)
    coefficients, covariance = inverse @ target, inverse @ inverse.T
    if errors is not None:
        return coefficients, covariance, NormalDist().inv_cdf(level)
    free = len(y) - design.shape[1]
    variance = (target - scaled @ coefficients).square().sum() / free
    return coefficients, covariance * variance, student_t_quantile(level, free)


def _fieller(alpha: float, beta: float, spread: list[list[float]]) -> Interval:
    """Fieller's interval of α/β among β > 0, of coefficients whose covariance is given times the critical value².

    It is where (α − ρβ)² ≤ s_αα − 2ρ s_αβ + ρ² s_ββ. Infinite at the upper end where β ≤ 0 is within the interval of
    β, and at both ends where β is below 0 beyond it: then there is no peak.
    """
    (s_aa, s_ab), (_, s_bb) = spread
    a, b, c = beta**2 - s_bb, alpha * beta - s_ab, alpha**2 - s_aa
    root = b**2 - a * c
    if a > 0:
        if beta < 0:
            return math.inf, math.inf
        half = math.sqrt(max(root, 0.0))
        return (b - half) / a, (b + half) / a
    at_zero = alpha * s_bb - s_ab * beta  # the sign of α where the region meets β = 0
    if root <= 0 or a == 0 or at_zero <= 0:
        return -math.inf, math.inf
    return (b - math.sqrt(root)) / a, math.inf


def _peak(quotient: float, method: str) -> float:
    """d* for α/β."""
    if method == "best_of_n":
        return max(quotient / 2, 0.0)
    return math.exp(quotient - 1) if quotient < 700 else math.inf


def _shown(interval: Interval) -> str:
    return f"[{interval[0]:.3g}, {interval[1]:.3g}]"
