"""Objectives that say where each log-ratio should be, and those that compare quantiles."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_rlhf import functional as RF
from lightning_rlhf.objectives.base import WithReference
from lightning_rlhf.objectives.pairs import Pairs


@dataclass(frozen=True)
class NCA(WithReference):
    """Noise contrastive alignment; see :func:`lightning_rlhf.functional.nca_loss`."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.nca_loss`."""
        return RF.nca_loss(*pairs.logps, beta=self.beta)


@dataclass(frozen=True)
class BCO(WithReference):
    """Binary classifier optimisation; see :func:`lightning_rlhf.functional.bco_loss`.

    Its δ is the mean reward of all completions of earlier optimizer steps, over all ranks: 0 in the first step,
    constant within a step, kept in float64 and in checkpoints.
    """

    needs_reward_mean: ClassVar[bool] = True

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.bco_loss`."""
        mean = pairs.chosen.logps.new_zeros(()) if pairs.reward_mean is None else pairs.reward_mean
        return RF.bco_loss(*pairs.logps, mean.to(pairs.chosen.logps), beta=self.beta)


@dataclass(frozen=True)
class SPPO(WithReference):
    """Self-play preference optimisation with hard labels; see :func:`lightning_rlhf.functional.sppo_loss`."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.sppo_loss`."""
        return RF.sppo_loss(*pairs.logps, beta=self.beta)


@dataclass(frozen=True)
class APOZero(WithReference):
    """Raise the chosen, lower the rejected completion; see :func:`lightning_rlhf.functional.apo_zero_loss`."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.apo_zero_loss`."""
        return RF.apo_zero_loss(*pairs.logps, beta=self.beta)


@dataclass(frozen=True)
class APODown(WithReference):
    """Lower both, the rejected completion more; see :func:`lightning_rlhf.functional.apo_down_loss`."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.apo_down_loss`."""
        return RF.apo_down_loss(*pairs.logps, beta=self.beta)


@dataclass(frozen=True)
class AOT(WithReference):
    """Alignment by optimal transport, sorted over a micro-batch; see :func:`lightning_rlhf.functional.aot_loss`.

    Attributes:
        label_smoothing: Assumed share of flipped labels.
    """

    sorts_batch: ClassVar[bool] = True
    label_smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per quantile; see :func:`lightning_rlhf.functional.aot_loss`."""
        return RF.aot_loss(*pairs.logps, beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired(WithReference):
    """The same without pairs; see :func:`lightning_rlhf.functional.aot_unpaired_loss`.

    Attributes:
        label_smoothing: Assumed share of flipped labels.
    """

    sorts_batch: ClassVar[bool] = True
    label_smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per quantile; see :func:`lightning_rlhf.functional.aot_unpaired_loss`."""
        return RF.aot_unpaired_loss(*pairs.logps, beta=self.beta, label_smoothing=self.label_smoothing)
