"""A reward under constraints: each has a multiplier that rises while it is not met."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_rlhf.functional.moments import mean_and_std_of_moments, moments
from lightning_rlhf.rewards.base import Reward, RewardResult, begin, require_unique
from lightning_rlhf.rewards.samples import Samples
from lightning_rlhf.rewards.statistics import over_ranks


class ConstrainedReward(Reward):
    r"""A reward to maximise while others stay above thresholds, such as helpfulness subject to harmlessness.

    $\max_\pi E[r]$ subject to $E[c_k] \ge t_k$ by its Lagrangian: samples are worth

    $\frac{r + \sum_k \lambda_k (c_k - t_k)}{1 + \sum_k \lambda_k}$,

    and after each rollout $\lambda_k \leftarrow \min(\max(\lambda_k + \eta (t_k - \bar c_k), 0), \lambda_{max})$, with
    $\bar c_k$ the mean over the rollout on all ranks: dual ascent, as in Dai et al. (2024), "Safe RLHF", section 3.2.
    The division keeps the scale of the reward, and so what a KL coefficient means. Multipliers move in train mode only
    and are kept in checkpoints.

    The parts are ``reward`` and each constraint's own value under its key, and ``multiplier/key``.

    Args:
        reward: r, what is maximised.
        constraints: c by the name that each is logged under.
        thresholds: t by the same names.
        lr: η, per rollout.
        start: λ at the start, of all constraints.
        max_multiplier: λ at most: a constraint that cannot be met would else take over.
        name: Of the Lagrangian, in messages.

    Raises:
        ValueError: If there is no constraint, one has no threshold, or a number is out of range.

    Example:
        >>> from lightning_rlhf.rewards import FunctionReward, score
        >>> helpful = FunctionReward(lambda completions: [4.0 for _ in completions])
        >>> harmless = FunctionReward(lambda completions: [0.0 for _ in completions])
        >>> reward = ConstrainedReward(helpful, {"harmless": harmless}, {"harmless": 0.5}, lr=2.0)
        >>> samples = Samples(["Hi"], ["Yo"], [[5]], [[6, 2]], [False])
        >>> score(reward, samples).total, reward.multipliers  # the multiplier moves after the rollout
        (tensor([4.]), {'harmless': 1.0})
        >>> score(reward.eval(), samples).total  # (4 + 1 · (0 − 0.5)) / 2
        tensor([1.7500])
    """

    def __init__(
        self,
        reward: Reward,
        constraints: dict[str, Reward],
        thresholds: dict[str, float],
        lr: float = 0.05,
        start: float = 0.0,
        max_multiplier: float = 10.0,
        name: str = "constrained_reward",
    ) -> None:
        super().__init__(name)
        if not constraints:
            raise ValueError("constraints is empty: give at least one, or use the reward alone")
        if set(thresholds) != set(constraints) or not all(map(math.isfinite, thresholds.values())):
            raise ValueError(
                f"thresholds must be a finite number for each of {', '.join(constraints)}, got {thresholds}"
            )
        if lr <= 0 or not 0 <= start <= max_multiplier:
            raise ValueError(
                f"lr ({lr}) must be positive, and start ({start}) between 0 and max_multiplier ({max_multiplier})"
            )
        if "reward" in constraints:
            raise ValueError(
                "a constraint cannot be called 'reward': that is what the objective is logged under"
            )
        self.reward = reward
        self.constraints = nn.ModuleList(constraints.values())
        self.thresholds = {key: float(thresholds[key]) for key in constraints}
        self.lr, self.max_multiplier = lr, max_multiplier
        self.multipliers = dict.fromkeys(constraints, float(start))
        require_unique(self.part_names)

    @property
    def part_names(self) -> tuple[str, ...]:
        """``reward``, each constraint, and ``multiplier/key``."""
        return ("reward", *self.multipliers, *(f"multiplier/{key}" for key in self.multipliers))

    def start(self, samples: Samples) -> Callable[[], RewardResult]:
        """Begin with all of them."""
        waits = [begin(one, samples) for one in (self.reward, *self.constraints)]
        return lambda: self._lagrangian([wait().total for wait in waits])

    def forward(self, samples: Samples) -> RewardResult:
        """The Lagrangian and its terms."""
        return self.start(samples)()

    def _lagrangian(self, totals: Sequence[Tensor]) -> RewardResult:
        reward, *constraints = totals
        found = dict(zip(self.multipliers, constraints, strict=True))
        total = reward.clone()
        for key, values in found.items():
            total += self.multipliers[key] * (values - self.thresholds[key])
        total /= 1.0 + sum(self.multipliers.values())
        used = {
            f"multiplier/{key}": torch.full_like(reward, value) for key, value in self.multipliers.items()
        }
        if self.training:
            for key, values in found.items():
                self._raise(key, mean_and_std_of_moments(over_ranks(moments(values)))[0].item())
        return RewardResult(total, {"reward": reward, **found, **used})

    def _raise(self, key: str, mean: float) -> None:
        moved = self.multipliers[key] + self.lr * (self.thresholds[key] - mean)
        self.multipliers[key] = min(max(moved, 0.0), self.max_multiplier)

    def get_extra_state(self) -> dict[str, float]:
        """The multipliers, as plain numbers that no precision plugin casts."""
        return dict(self.multipliers)

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Take the multipliers of a checkpoint.

        Raises:
            ValueError: If it has other constraints.
        """
        if set(state) != set(self.multipliers):
            raise ValueError(
                f"the checkpoint has multipliers of {', '.join(state)}, and the constraints are "
                f"{', '.join(self.multipliers)}"
            )
        self.multipliers = dict(state)
