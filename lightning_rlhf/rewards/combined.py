"""Rewards made of rewards: weighted sums and ensembles."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_rlhf.models import Aggregation
from lightning_rlhf.rewards.base import Reward, RewardResult, begin, require_unique
from lightning_rlhf.rewards.samples import Samples
from lightning_rlhf.rewards.scorers import RewardModelReward


class WeightedReward(Reward):
    r"""A weighted sum of several rewards, $\sum_k w_k r_k$.

    All of them begin before any is waited for, so that functions that are coroutines and endpoints answer while models
    compute. The parts are each reward's own value, unweighted, under its key, and what it is made of under
    ``key/part``.

    Args:
        rewards: By the name that each is logged under.
        weights: By the same names; 1 where one is not given. May be negative: a cost.
        name: Of the sum, in messages.

    Raises:
        ValueError: If there is no reward, or a weight is of none or not finite.

    Example:
        >>> from lightning_rlhf.rewards import FunctionReward, score
        >>> short = FunctionReward(lambda completion_ids: [-len(ids) for ids in completion_ids])
        >>> reward = WeightedReward({"short": short}, {"short": 0.5})
        >>> result = score(reward, Samples(["Hi"], ["Yo"], [[5]], [[6, 2]], [False]))
        >>> result.total, result.parts
        (tensor([-1.]), {'short': tensor([-2.])})
    """

    def __init__(
        self,
        rewards: dict[str, Reward],
        weights: dict[str, float] | None = None,
        name: str = "weighted_reward",
    ) -> None:
        super().__init__(name)
        given = weights or {}
        if not rewards:
            raise ValueError("rewards is empty: give at least one")
        for key, weight in given.items():
            if key not in rewards:
                raise ValueError(f"weights names {key!r}, and the rewards are {', '.join(rewards)}")
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {key!r} is {weight}; it must be finite")
        self.weights = {key: float(given.get(key, 1.0)) for key in rewards}
        self.rewards = nn.ModuleList(rewards.values())
        require_unique(self.part_names)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Each key, and ``key/part``."""
        return tuple(
            part
            for key, reward in zip(self.weights, _rewards(self.rewards), strict=True)
            for part in (key, *(f"{key}/{n}" for n in reward.part_names if n != reward.name))
        )

    def start(self, samples: Samples) -> Callable[[], RewardResult]:
        """Begin with all rewards."""
        waits = [begin(reward, samples) for reward in _rewards(self.rewards)]
        return lambda: self._sum([wait() for wait in waits], samples)

    def forward(self, samples: Samples) -> RewardResult:
        """The sum and its terms."""
        return self.start(samples)()

    def _sum(self, results: Sequence[RewardResult], samples: Samples) -> RewardResult:
        total = torch.zeros(len(samples))
        parts: dict[str, Tensor] = {}
        for (key, weight), reward, result in zip(
            self.weights.items(), _rewards(self.rewards), results, strict=True
        ):
            total = total + weight * result.total
            parts[key] = result.total
            parts |= {f"{key}/{n}": v for n, v in result.parts.items() if n != reward.name}
        return RewardResult(total, parts)


class RewardEnsemble(Reward):
    """Several rewards of the same completions that become one: mean, worst case, or mean minus variance.

    Coste et al. (2023), "Reward Model Ensembles Help Mitigate Overoptimization"; see
    :class:`~lightning_rlhf.models.Aggregation`. Each member has its own base and tokenizer, or shares the policy's.
    The parts are the ensemble's value, each ``member_i``, and ``disagreement``, the members' standard deviation.

    Args:
        members: Rewards, or paths of reward models.
        aggregation: How the members' values become one.
        name: What its values are logged under.

    Raises:
        ValueError: If there is no member.
    """

    def __init__(
        self,
        members: list[Reward | str],
        aggregation: Aggregation | None = None,
        name: str = "reward_ensemble",
    ) -> None:
        super().__init__(name)
        if not members:
            raise ValueError("members is empty: an ensemble needs at least one")
        built = [
            RewardModelReward(member, name=f"{name}_{index}") if isinstance(member, str) else member
            for index, member in enumerate(members)
        ]
        self.members = nn.ModuleList(built)
        self.aggregation = aggregation or Aggregation()

    @property
    def part_names(self) -> tuple[str, ...]:
        """Its own name, each ``member_i``, and ``disagreement``."""
        return (self.name, *(f"member_{i}" for i in range(len(self.members))), "disagreement")

    def start(self, samples: Samples) -> Callable[[], RewardResult]:
        """Begin with all members."""
        waits = [begin(member, samples) for member in _rewards(self.members)]
        return lambda: self._aggregate([wait().total for wait in waits])

    def forward(self, samples: Samples) -> RewardResult:
        """The aggregated reward, and the members'."""
        return self.start(samples)()

    def _aggregate(self, totals: list[Tensor]) -> RewardResult:
        scores = torch.stack(totals)
        values = (self.aggregation(scores), *scores, scores.std(0, correction=0))
        return RewardResult(values[0], dict(zip(self.part_names, values, strict=True)))


def _rewards(modules: nn.ModuleList) -> list[Reward]:
    return list(modules)  # type: ignore[arg-type]
