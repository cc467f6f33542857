"""Proxy and gold reward over the distance from the starting policy."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_same_shape
from lightning_rlhf.functional.goodhart import GoodhartEstimate, goodhart_gap
from lightning_rlhf.functional.overoptimization import Method, OveroptimizationFit, fit_overoptimization
from lightning_rlhf.functional.rank_correlation import spearman_correlation
from lightning_rlhf.metrics.aggregation import _Float64States
from lightning_rlhf.metrics.checks import require_finite_states

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GoodhartCurve", "GoodhartGap"]

_MIN_POINTS = 4  # three unknowns, and one more to see the scatter


class GoodhartCurve(NamedTuple):
    """One row per evaluation, ordered by step, in standard deviations of the starting policy's samples.

    Attributes:
        steps: What each evaluation was called in ``update``, ``(T,)``.
        kl: Mean KL, in nats, ``(T,)``.
        proxy: Mean standardised proxy, ``(T,)``.
        gold: Mean standardised gold, ``(T,)``.
        proxy_error: Standard error of the proxy's mean, ``(T,)``; nan for a single sample.
        gold_error: That of gold.
    """

    steps: Tensor
    kl: Tensor
    proxy: Tensor
    gold: Tensor
    proxy_error: Tensor
    gold_error: Tensor


class GoodhartGap(_Float64States):
    """Proxy against gold reward along a run: the gaps between them, and the fitted curve of gold.

    Twin of :func:`lightning_rlhf.functional.goodhart_gap` and :func:`lightning_rlhf.functional.fit_overoptimization`.
    Every evaluation has a number, such as the optimizer step; updates with one number, on any rank, are one
    evaluation. The lowest number is the starting policy, whose samples standardise all others. All samples are kept,
    32 bytes each, so that the bootstrap is exact over processes.

    Args:
        method: The fitted form, ``rl`` or ``best_of_n``.
        confidence: Of the gaps' intervals, in (0, 1).
        num_resamples: Of their bootstrap.
        seed: Of their bootstrap.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> metric = GoodhartGap()
        >>> metric.update(0, torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0]))
        >>> metric.update(10, torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), torch.tensor([0.0, 2.0]))
        >>> found = metric.compute()
        >>> print(f"{found['kl']:.1f} {found['proxy']:.3f} {found['gold']:.3f} {found['gap']:.3f}")
        1.5 2.121 0.707 1.414
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    samples: list[Tensor]

    def __init__(
        self, *, method: Method = "rl", confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
    ) -> None:
        super().__init__()
        if method not in ("rl", "best_of_n"):
            raise ValueError(f"method must be rl or best_of_n, got {method!r}")
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
        if num_resamples < 1:
            raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
        self.method: Method = method
        self.confidence = confidence
        self.num_resamples = num_resamples
        self.seed = seed
        self.set_dtype(torch.float64)  # what a rank without samples sends to the others
        # Flat rows of step, KL, proxy and gold: torchmetrics stands one-dimensional nothing in for such a rank.
        self.add_state("samples", [], dist_reduce_fx="cat")

    def update(self, step: int, kl: Tensor, proxy: Tensor, gold: Tensor) -> None:
        """Add samples of an evaluation.

        Args:
            step: Its number; the lowest one is the starting policy.
            kl: KL(π‖π₀) of each sample, in nats, ``(N,)``.
            proxy: Its proxy reward, ``(N,)``.
            gold: Its gold reward, ``(N,)``.

        Raises:
            ValueError: If the shapes differ.
        """
        require_same_shape("proxy", proxy, "gold", gold)
        require_same_shape("kl", kl, "proxy", proxy)
        columns = [torch.full_like(kl, step, dtype=torch.float64), kl, proxy, gold]
        self.samples.append(torch.stack([c.detach().double() for c in columns], dim=1).flatten())

    def compute(self) -> dict[str, Tensor]:
        """The latest evaluation and the curve so far, as scalars, float64.

        ``proxy``, ``gold``, ``gap``, ``excess_gap`` (each gap with ``_lower`` and ``_upper``), ``kl``, ``correlation``
        (ρ₀), ``rank_correlation`` (Spearman's, of the evaluations' means), and of the fit ``alpha``, ``beta``,
        ``peak_kl`` and ``kl_left``, which are infinite where there is no peak. What too few evaluations do not give
        is nan.

        Raises:
            ValueError: If a value since the last reset was not finite, or a reward does not vary on the starting
                policy's samples.
        """
        return summary_of(
            self._evaluations(self.samples),
            method=self.method,
            confidence=self.confidence,
            num_resamples=self.num_resamples,
            seed=self.seed,
        )

    def curve(self) -> GoodhartCurve:
        """All evaluations, over all processes, each of which has to call this.

        Raises:
            ValueError: As :meth:`compute`, and if nothing was seen.
        """
        with self.sync_context():
            samples = self.samples
        evaluations = self._evaluations(samples)
        if not evaluations:
            raise ValueError("GoodhartGap has seen no sample: call update() first")
        return curve_of(evaluations)

    def fit(self) -> OveroptimizationFit | None:
        """The fitted curve of gold, over all processes; None below four evaluations of different KL."""
        return fit_of(self.curve(), self.method)

    def plot(
        self, curve: GoodhartCurve | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | None, Axes]":
        """Draw proxy and gold over √KL with 95% bands, the fit of gold and its peak.

        Args:
            curve: What to draw; by default :meth:`curve`.
            ax: Where to draw it; by default a figure of its own.

        Returns:
            The figure, which is None where ``ax`` was given, and the axes.
        """
        from lightning_rlhf.metrics.goodhart_plot import draw

        curve = curve or self.curve()
        return draw(curve, fit_of(curve, self.method), ax)

    def _evaluations(self, samples: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """The samples of each evaluation (N, 4) by step, in an order that no cut into batches or ranks changes."""
        flat = torch.cat(list(samples)) if isinstance(samples, (list, tuple)) and samples else samples
        if not isinstance(flat, Tensor) or not flat.numel():
            return []
        require_finite_states(self, "kl, proxy or gold", flat)
        rows = flat.reshape(-1, 4).cpu()
        for column in (1, 3, 2, 0):
            rows = rows[rows[:, column].argsort(stable=True)]
        _, counts = rows[:, 0].unique_consecutive(return_counts=True)
        return list(rows.split(counts.tolist()))


_NAMES = (
    *GoodhartEstimate._fields,
    "kl",
    "rank_correlation",
    "alpha",
    "beta",
    "peak_kl",
    "kl_left",
)


def curve_of(evaluations: Sequence[Tensor]) -> GoodhartCurve:
    """The curve of evaluations in their order, the first of which standardises.

    Args:
        evaluations: Rows of step, KL, proxy and gold, each ``(N, 4)``.

    Example:
        >>> start = torch.tensor([[0.0, 0.0, -1.0, 1.0], [0.0, 0.0, 1.0, 3.0]])
        >>> curve_of([start, start + torch.tensor([5.0, 1.0, 0.0, 0.0])]).gold
        tensor([0., 0.])
    """
    start = evaluations[0][:, 2:]
    mean, std = start.mean(0), start.std(0)
    means = torch.stack([rows.mean(0) for rows in evaluations])
    errors = torch.stack([rows[:, 2:].std(0) / len(rows) ** 0.5 for rows in evaluations]) / std
    z = (means[:, 2:] - mean) / std
    return GoodhartCurve(means[:, 0], means[:, 1], z[:, 0], z[:, 1], errors[:, 0], errors[:, 1])


def fit_of(curve: GoodhartCurve, method: Method) -> OveroptimizationFit | None:
    """The fitted gold of a curve; None below four evaluations of different KL."""
    kl = curve.kl.clamp(min=0.0)  # k1 and rounding may be below
    if len(kl.unique()) < _MIN_POINTS:
        return None
    return fit_overoptimization(kl, curve.gold, method=method)


def summary_of(
    evaluations: Sequence[Tensor], *, method: Method, confidence: float, num_resamples: int, seed: int
) -> dict[str, Tensor]:
    """What :meth:`GoodhartGap.compute` gives, of evaluations as for :func:`curve_of`."""
    if not evaluations:
        return {name: torch.tensor(math.nan, dtype=torch.float64) for name in _NAMES}
    curve = curve_of(evaluations)
    latest = goodhart_gap(
        *evaluations[-1].T[2:],
        *evaluations[0].T[2:],
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )
    fit = fit_of(curve, method)
    numbers = [math.nan] * 4
    if fit is not None:
        numbers = [fit.alpha, fit.beta, fit.peak_kl, fit.kl_left(curve.kl[-1].item())]
    fitted = [torch.tensor(value, dtype=torch.float64) for value in numbers]
    ranks = spearman_correlation(curve.proxy, curve.gold)
    return dict(zip(_NAMES, [*latest, curve.kl[-1], ranks, *fitted], strict=True))
