"""Several objectives at once."""

from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf.objectives.base import Objective
from lightning_rlhf.objectives.pairs import Completions, Pairs


@dataclass(frozen=True)
class Weighted(Objective):
    r"""A weighted sum of objectives, $\sum_k w_k L_k$; rewards and logged log-probabilities are the first one's.

    It needs a reference, or a running mean, where one of its objectives does.

    Attributes:
        objectives: At least one, the one that names the rewards first.
        weights: One a term.

    Raises:
        ValueError: If there is no objective, or another number of weights.

    Example:
        >>> from lightning_rlhf.objectives import SFTTerm, Sigmoid
        >>> Weighted([Sigmoid(beta=0.1), SFTTerm()], [1.0, 0.2]).needs_reference
        True
    """

    objectives: tuple[Objective, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Lists, as YAML has them, become tuples."""
        object.__setattr__(self, "objectives", tuple(self.objectives))
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.objectives or len(self.objectives) != len(self.weights):
            raise ValueError(
                f"Weighted needs objectives and one weight for each, got {len(self.objectives)} objectives and "
                f"{len(self.weights)} weights"
            )

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether one of the objectives reads a reference."""
        return any(objective.needs_reference for objective in self.objectives)

    @property
    def needs_reward_mean(self) -> bool:  # type: ignore[override]
        """Whether one of the objectives reads the running mean of rewards."""
        return any(objective.needs_reward_mean for objective in self.objectives)

    @property
    def sorts_batch(self) -> bool:  # type: ignore[override]
        """Whether one of the objectives gives its losses in another order than the pairs."""
        return any(objective.sorts_batch for objective in self.objectives)

    @property
    def extra_metric_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of all objectives."""
        return tuple(dict.fromkeys(name for o in self.objectives for name in o.extra_metric_names))

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair."""
        first, *rest = (w * o(pairs) for w, o in zip(self.weights, self.objectives, strict=True))
        return sum(rest, start=first)

    def rewards(self, completions: Completions) -> Tensor:
        """The rewards of the first objective."""
        return self.objectives[0].rewards(completions)

    def logps(self, completions: Completions) -> Tensor:
        """What the first objective logs."""
        return self.objectives[0].logps(completions)

    def extra_metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Those of all objectives; the first one's where two have the same."""
        values: dict[str, Tensor] = {}
        for objective in reversed(self.objectives):
            values |= objective.extra_metrics(pairs)
        return values
