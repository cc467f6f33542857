"""Whether a reward model is as sure as it is right."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_rlhf.functional.calibration import (
    ReliabilityCurve,
    calibration_bins,
    curve_of_bins,
    error_of_bins,
)
from lightning_rlhf.functional.checks import require_same_shape
from lightning_rlhf.functional.intervals import wilson_interval
from lightning_rlhf.metrics.aggregation import _Float64States
from lightning_rlhf.metrics.checks import require_finite_states

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CalibrationError"]

# Below this, the noise of the bins is no longer small against the errors that matter (a few hundredths).
_ENOUGH_PAIRS = 3000


class CalibrationError(_Float64States):
    """Expected calibration error of σ(margin), and its reliability curve.

    Twin of :func:`lightning_rlhf.functional.calibration_error` and
    :func:`lightning_rlhf.functional.reliability_curve`. Warns once when it is read on fewer than 3,000 pairs: even
    a perfect model shows about 0.04 on 500.

    Args:
        num_bins: Bins of equal width on [0.5, 1].

    Raises:
        ValueError: If ``num_bins`` is below 1.

    Example:
        >>> metric = CalibrationError()
        >>> metric.update(torch.full((3000,), 50.0), torch.zeros(3000))
        >>> metric.update(torch.zeros(1000), torch.full((1000,), 50.0))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    bins: Tensor

    def __init__(self, *, num_bins: int = 10) -> None:
        super().__init__()
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins}")
        self.num_bins = num_bins
        self._warned = False
        self.add_state("bins", torch.zeros(3, num_bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add pairs.

        Args:
            chosen: Scores of the preferred completions, ``(N,)``.
            rejected: Those of the other completions, ``(N,)``.

        Raises:
            ValueError: If the shapes differ.
        """
        require_same_shape("chosen", chosen, "rejected", rejected)
        self.bins = self.bins + calibration_bins(chosen.double() - rejected.double(), num_bins=self.num_bins)

    def compute(self) -> Tensor:
        """The error, in [0, 1]; nan where nothing was seen.

        Raises:
            ValueError: If a score since the last reset was not finite.
        """
        require_finite_states(self, "chosen or rejected", self.bins)
        pairs = int(self.bins[0].sum())
        if pairs < _ENOUGH_PAIRS and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"the calibration error is measured on {pairs} pairs, which is too few: noise adds to it, and even a "
                f"perfect model shows about 0.04 on 500. Use at least {_ENOUGH_PAIRS} pairs."
            )
        return error_of_bins(self.bins)

    def curve(self) -> ReliabilityCurve:
        """The reliability curve over all processes, each of which has to call this.

        Raises:
            ValueError: If a score since the last reset was not finite.
        """
        with self.sync_context():
            bins = self.bins
        require_finite_states(self, "chosen or rejected", bins)
        return curve_of_bins(bins)

    def plot(
        self, curve: ReliabilityCurve | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | None, Axes]":
        """Draw confidence against accuracy, with each bin's 95% interval: bars that miss the diagonal mean something.

        Args:
            curve: What to draw; by default :meth:`curve`.
            ax: Where to draw it; by default a figure of its own.

        Returns:
            The figure, which is None where ``ax`` was given, and the axes.
        """
        import matplotlib.pyplot as plt

        curve = curve or self.curve()
        seen = curve.counts > 0
        confidence, accuracy, counts = (part[seen].cpu() for part in curve)
        lower, upper = wilson_interval(accuracy * counts, counts)
        bars = torch.stack([accuracy - lower, upper - accuracy]).clamp(min=0.0)
        error = error_of_bins(torch.stack([counts, confidence * counts, accuracy * counts]))
        figure, axes = (None, ax) if ax is not None else plt.subplots()
        axes.plot([0.5, 1.0], [0.5, 1.0], color="grey", linestyle="--", label="calibrated")
        axes.errorbar(
            confidence.numpy(), accuracy.numpy(), yerr=bars.numpy(), fmt="o-", capsize=3, label="measured"
        )
        for x, y, count in zip(confidence.tolist(), upper.tolist(), counts.tolist(), strict=True):
            axes.annotate(f"{count:,.0f}", (x, y), (0, 4), textcoords="offset points", ha="center")
        axes.set_title(f"expected calibration error {error:.3f} on {counts.sum():,.0f} pairs")
        axes.set(
            xlabel="confidence of the preferred order", ylabel="share ordered as labelled", xlim=(0.49, 1.01)
        )
        axes.margins(y=0.08)  # room for the counts
        axes.legend(loc="upper left")
        return figure, axes
