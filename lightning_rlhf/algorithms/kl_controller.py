"""The weight of the KL penalty, fixed or steered towards a target."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_rlhf import functional as RF


@dataclass(frozen=True)
class KLControl:
    """The KL penalty.

    Attributes:
        coef: kl_coef, in reward per nat; where it is steered, its start.
        target: KL(π‖π_ref) of a response to steer to, in nats, summed over its tokens; None keeps ``coef`` fixed.
        horizon: Episodes in which the coefficient moves, about a factor of 2 every 3.5 horizons.
        estimator: Of the KL of a token in the reward: ``k1`` (log π − log π_ref), or ``exact``, with the vocabulary
            summed out: less noise, and never negative.
    """

    coef: float = 0.05
    target: float | None = None
    horizon: float = 10_000
    estimator: Literal["k1", "exact"] = "k1"

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        if self.coef < 0 or (self.target is not None and self.coef == 0):
            raise ValueError(f"kl.coef must not be negative, and positive with a target, got {self.coef}")
        if self.target is not None and self.target <= 0:
            raise ValueError(f"kl.target must be positive, got {self.target}; null keeps kl.coef fixed")
        if self.horizon <= 0:
            raise ValueError(f"kl.horizon must be positive, got {self.horizon}")
        if self.estimator not in ("k1", "exact"):
            raise ValueError(f"kl.estimator must be k1 or exact, got {self.estimator!r}")


class KLController(nn.Module):
    """The coefficient as it is now; part of checkpoints, in float64.

    Args:
        control: Its settings.
    """

    def __init__(self, control: KLControl) -> None:
        super().__init__()
        self.control = control
        self.coef = control.coef

    def update(self, kl: float, num_episodes: int) -> None:
        """Move the coefficient after episodes with a mean KL, in nats; it stays where there is no target."""
        if self.control.target is not None:
            self.coef = RF.adaptive_kl_coef(
                self.coef,
                kl,
                target=self.control.target,
                horizon=self.control.horizon,
                num_episodes=num_episodes,
            )

    def get_extra_state(self) -> float:
        """The coefficient."""
        return self.coef

    def set_extra_state(self, state: float) -> None:
        """Take that of a checkpoint."""
        self.coef = state
