"""Shaping: what is done to a reward's values before they are optimised, combined by listing."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_rlhf import functional as RF
from lightning_rlhf.rewards.base import Reward, RewardResult, begin, require_unique
from lightning_rlhf.rewards.samples import Samples


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
