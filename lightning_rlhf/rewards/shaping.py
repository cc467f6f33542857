"""Shaping: what is done to a reward's values before they are optimised, combined by listing."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_rlhf import functional as RF
from lightning_rlhf.functional.moments import (
    mean_and_std_of_moments,
    merge_moments,
    moments,
    regression_of_moments,
)
from lightning_rlhf.rewards.base import Reward, RewardResult, Samples, begin, require_unique


class Shaper(nn.Module):
    """Base of all shaping. A subclass writes ``forward``."""

    def forward(self, values: Tensor, samples: Samples) -> Tensor:
        """Shaped values of samples, ``(N,)``, from their values, ``(N,)``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")


class ShapedReward(Reward):
    """A reward whose values pass through some shapers, one after the other.

    The parts are those of the reward and, under its own name, the shaped values.

    Args:
        reward: What scores.
        shapers: What is done to it, in this order.
        name: What the shaped values are logged under.

    Example:
        >>> from lightning_rlhf.rewards import FunctionReward, score
        >>> reward = FunctionReward(lambda completions: [9.0 for _ in completions], name="nine")
        >>> shaped = ShapedReward(reward, [Clip(-5.0, 5.0), LengthPenalty(0.5)])
        >>> score(shaped, Samples(["Hi"], ["Yo"], [[5]], [[6, 2]], [False])).parts
        {'nine': tensor([9.]), 'shaped_reward': tensor([4.])}
    """

    def __init__(self, reward: Reward, shapers: list[Shaper], name: str = "shaped_reward") -> None:
        super().__init__(name)
        self.reward = reward
        self.shapers = nn.ModuleList(shapers)
        require_unique(self.part_names)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Those of the reward, and its own."""
        return (*self.reward.part_names, self.name)

    def start(self, samples: Samples) -> Callable[[], RewardResult]:
        """Begin with the reward."""
        wait = begin(self.reward, samples)
        return lambda: self._shaped(wait(), samples)

    def forward(self, samples: Samples) -> RewardResult:
        """The shaped reward, and what it was."""
        return self.start(samples)()

    def _shaped(self, result: RewardResult, samples: Samples) -> RewardResult:
        values = result.total
        for shaper in self.shapers:
            values = shaper(values, samples).float()
        return RewardResult(values, {**result.parts, self.name: values})


class Clip(Shaper):
    """Limit values to an interval.

    Args:
        low: Values below become this.
        high: Values above become this.

    Raises:
        ValueError: If ``low`` is not less than ``high``.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"low must be less than high, got {low} and {high}")
        self.low, self.high = low, high

    def forward(self, values: Tensor, samples: Samples) -> Tensor:
        """Values in [low, high]."""
        return values.clamp(self.low, self.high)


class MissingEOSPenalty(Shaper):
    """Make a completion that was cut off before it ended worth less.

    Args:
        penalty: Is subtracted, at least 0 (TRL's ``missing_eos_penalty``).
        replacement: Is the value instead, whatever the reward said (TRL's ``non_eos_penalty`` of old).

    Raises:
        ValueError: If ``penalty`` is negative.
    """

    def __init__(self, penalty: float = 1.0, replacement: float | None = None) -> None:
        super().__init__()
        if penalty < 0:
            raise ValueError(f"penalty is subtracted and must be at least 0, got {penalty}")
        self.penalty, self.replacement = penalty, replacement

    def forward(self, values: Tensor, samples: Samples) -> Tensor:
        """Values, lower where there is no EOS."""
        truncated = torch.tensor(list(samples.truncated), dtype=torch.bool)
        if self.replacement is not None:
            return torch.where(truncated, self.replacement, values)
        return values - self.penalty * truncated.float()


class LengthPenalty(Shaper):
    r"""Subtract a price per token, $r - c \cdot |y|$.

    Args:
        coef: c, in reward per token; negative rewards length.
    """

    def __init__(self, coef: float) -> None:
        super().__init__()
        self.coef = coef

    def forward(self, values: Tensor, samples: Samples) -> Tensor:
        """Values less the price of their length."""
        return values - self.coef * samples.lengths.float()


class SoftOverlong(Shaper):
    """Add DAPO's penalty of overlong completions; see :func:`lightning_rlhf.functional.soft_overlong_penalty`.

    Args:
        max_length: Tokens from which on the penalty is whole.
        buffer: Tokens before that on which it grows.
        coef: The whole penalty.
    """

    def __init__(self, max_length: int, buffer: int, coef: float = 1.0) -> None:
        super().__init__()
        RF.soft_overlong_penalty(
            torch.zeros(1), max_length=max_length, buffer=buffer
        )  # refuses what is wrong
        self.max_length, self.buffer, self.coef = max_length, buffer, coef

    def forward(self, values: Tensor, samples: Samples) -> Tensor:
        """Values, lower where completions are overlong."""
        penalty = RF.soft_overlong_penalty(samples.lengths, max_length=self.max_length, buffer=self.buffer)
        return values + self.coef * penalty


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
                    "first samples of a training only)"
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
