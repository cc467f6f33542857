"""Objectives of the margin between both log-ratios."""

from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf import functional as RF
from lightning_rlhf.objectives.base import Margin
from lightning_rlhf.objectives.pairs import Pairs


@dataclass(frozen=True)
class Sigmoid(Margin):
    """DPO's logistic loss; see :func:`lightning_rlhf.functional.dpo_loss`.

    Attributes:
        label_smoothing: Assumed share of flipped labels (cDPO).
    """

    label_smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.dpo_loss`."""
        return RF.dpo_loss(*self.scores(pairs), beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class LengthNormalizedSigmoid(Margin):
    """DPO on log-ratios a token; see :func:`lightning_rlhf.functional.length_normalized_dpo_loss`.

    Attributes:
        label_smoothing: Assumed share of flipped labels.
    """

    label_smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.length_normalized_dpo_loss`."""
        return RF.length_normalized_dpo_loss(
            *self.scores(pairs), *pairs.lengths, beta=self.beta, label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True)
class IPO(Margin):
    """Identity preference optimisation; see :func:`lightning_rlhf.functional.ipo_loss`."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.ipo_loss`."""
        return RF.ipo_loss(*self.scores(pairs), *pairs.lengths, beta=self.beta)


@dataclass(frozen=True)
class Hinge(Margin):
    """A hinge on the log-ratios; see :func:`lightning_rlhf.functional.hinge_loss`."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.hinge_loss`."""
        return RF.hinge_loss(*self.scores(pairs), beta=self.beta)


@dataclass(frozen=True)
class Robust(Margin):
    """DPO corrected for flipped labels; see :func:`lightning_rlhf.functional.robust_dpo_loss`.

    Attributes:
        label_smoothing: Assumed share of flipped labels.
    """

    label_smoothing: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.robust_dpo_loss`."""
        return RF.robust_dpo_loss(*self.scores(pairs), beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class EXO(Margin):
    """Efficient exact optimisation; see :func:`lightning_rlhf.functional.exo_loss`.

    Attributes:
        label_smoothing: ε, above 0.
    """

    label_smoothing: float = 1e-3

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.exo_loss`."""
        return RF.exo_loss(*self.scores(pairs), beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class DiscoPOP(Margin):
    """A loss found by search; see :func:`lightning_rlhf.functional.discopop_loss`.

    Attributes:
        tau: Width of the blend between its two parts.
    """

    tau: float = 0.05

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.discopop_loss`."""
        return RF.discopop_loss(*self.scores(pairs), beta=self.beta, tau=self.tau)
