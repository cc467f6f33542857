"""Shaping by statistics of the rewards themselves: over all ranks, in float64, kept in checkpoints."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rlhf.functional.moments import (
    mean_and_std_of_moments,
    merge_moments,
    moments,
    regression_of_moments,
)
from lightning_rlhf.rewards.samples import Samples
from lightning_rlhf.rewards.shaping import Shaper


class Normalized(Shaper):
    r"""Divide by the standard deviation of all values seen so far, after taking their mean away: $(r - \bar r) / s$.

    Values are counted in before they are normalised, over all ranks, and in train mode only: a validation changes
    nothing. Mean and deviation (n − 1) are exact, in float64, and kept in checkpoints. While they have no spread,
    values are only centred.

    Args:
        center: Take the mean away; else only the scale changes (as in Engstrom et al., 2020).
    """

    def __init__(self, center: bool = True) -> None:
        super().__init__()
        self.center = center
        self._seen = moments(torch.empty(0))

    @property
    def mean(self) -> float:
        """Of all values seen; nan before the first."""
        return mean_and_std_of_moments(self._seen)[0].item()

    @property
    def std(self) -> float:
        """Of all values seen; nan below two."""
        return mean_and_std_of_moments(self._seen)[1].item()

    def forward(self, values: Tensor, samples: Samples) -> Tensor:
        """Values in units of those seen so far."""
        if self.training:
            self._seen = merge_moments(torch.stack([self._seen, over_ranks(moments(values))]))
        if self._seen[0] == 0:
            return values
        mean, std = self.mean, self.std
        scale = std if std > 1e-8 * max(1.0, abs(mean)) else 1.0
        return ((values.double() - (mean if self.center else 0.0)) / scale).float()

    def get_extra_state(self) -> dict[str, list[float]]:
        """What was seen, as plain numbers that no precision plugin casts."""
        return {"moments": self._seen.tolist()}

    def set_extra_state(self, state: dict[str, list[float]]) -> None:
        """Take what a checkpoint has seen."""
        self._seen = torch.tensor(state["moments"], dtype=torch.float64)


class LengthResidual(Shaper):
    r"""What length does not explain, $r - (a + b \cdot |y|)$.

    The line is fitted by least squares on reference samples: by :meth:`fit`, or else on the first samples that are
    shaped in train mode, over all ranks. In reinforcement learning those are of the policy as it starts. It does not
    change after that, and is kept in checkpoints.

    Args:
        slope: b, in reward per token, where it is known.
        intercept: a, where the slope is known.
    """

    def __init__(self, slope: float | None = None, intercept: float = 0.0) -> None:
        super().__init__()
        self.slope, self.intercept = slope, intercept

    def fit(self, values: Tensor, lengths: Tensor) -> None:
        """Fit the line to values and lengths of reference samples, each ``(N,)``, over all ranks.

        Raises:
            ValueError: If the lengths are all the same.
        """
        whole = over_ranks(moments(values, lengths))
        intercept, slope = (part.item() for part in regression_of_moments(whole))
        if not math.isfinite(slope):
            raise ValueError(
                f"LengthResidual cannot be fitted on {int(whole[0])} samples whose lengths are all the same: use more "
                "samples, or give slope and intercept"
            )
        self.slope, self.intercept = slope, intercept

    def forward(self, values: Tensor, samples: Samples) -> Tensor:
        """Residuals."""
        if self.slope is None:
            if not self.training:
                raise ValueError(
                    "LengthResidual is not fitted yet: call fit, or give slope and intercept (it fits itself on the "
                    "first samples of a training only). A GoodhartMonitor takes the unshaped reward as its proxy"
                )
            self.fit(values, samples.lengths)
        return values - (self.intercept + (self.slope or 0.0) * samples.lengths.float())

    def get_extra_state(self) -> dict[str, float | None]:
        """The line, as plain numbers."""
        return {"slope": self.slope, "intercept": self.intercept}

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Take the line of a checkpoint."""
        self.slope, self.intercept = state["slope"], state["intercept"]


def over_ranks(part: Tensor) -> Tensor:
    """Moments over all processes, from those of this one; the same on every rank."""
    if not dist.is_initialized():
        return part
    parts: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, part.tolist())
    return merge_moments(torch.tensor(parts, dtype=torch.float64))
