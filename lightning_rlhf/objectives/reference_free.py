"""Objectives without a reference: none is made, copied or computed."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf import functional as RF
from lightning_rlhf.functional.reference_free import Average
from lightning_rlhf.objectives.base import Objective
from lightning_rlhf.objectives.pairs import Completions, Pairs


@dataclass(frozen=True)
class ORPO(Objective):
    """Odds ratio preference optimisation; see :func:`lightning_rlhf.functional.orpo_loss`.

    Logged rewards and log-probabilities are means over tokens, as TRL logs them.

    Attributes:
        beta: Weight of the odds ratio's term.
        average: Over what the mean of the likelihood term is: ``tokens`` of a micro-batch, or ``sequences``.
    """

    needs_reference: ClassVar[bool] = False
    extra_metric_names: ClassVar[tuple[str, ...]] = ("nll_loss", "log_odds_ratio", "log_odds_chosen")
    beta: float = 0.1
    average: Average = "tokens"

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.orpo_loss`."""
        return RF.orpo_loss(*pairs.policy_logps, *pairs.lengths, beta=self.beta, average=self.average)

    def rewards(self, completions: Completions) -> Tensor:
        """β times the log-probability a token."""
        return self.beta * completions.averaged

    def logps(self, completions: Completions) -> Tensor:
        """Means over tokens."""
        return completions.averaged

    def extra_metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Both parts of the loss, and the log odds ratio itself."""
        odds = RF.log_odds_ratio(*pairs.policy_logps, *pairs.lengths)
        return {
            "nll_loss": _nll(pairs, self.average),
            "log_odds_ratio": F.logsigmoid(odds),
            "log_odds_chosen": odds,
        }


@dataclass(frozen=True)
class SimPO(Objective):
    """Simple preference optimisation; see :func:`lightning_rlhf.functional.simpo_loss`.

    Logged log-probabilities are means over tokens, as TRL logs them.

    Attributes:
        beta: Scale of the reward.
        gamma: The margin aimed at, in reward.
        label_smoothing: Assumed share of flipped labels.
    """

    needs_reference: ClassVar[bool] = False
    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.simpo_loss`."""
        return RF.simpo_loss(
            *pairs.policy_logps,
            *pairs.lengths,
            beta=self.beta,
            gamma=self.gamma,
            label_smoothing=self.label_smoothing,
        )

    def rewards(self, completions: Completions) -> Tensor:
        """β times the log-probability a token."""
        return self.beta * completions.averaged

    def logps(self, completions: Completions) -> Tensor:
        """Means over tokens."""
        return completions.averaged


@dataclass(frozen=True)
class CPO(Objective):
    """Contrastive preference optimisation; see :func:`lightning_rlhf.functional.cpo_loss`.

    Attributes:
        beta: Scale of the log-probabilities.
        cpo_alpha: Weight of the likelihood term.
        label_smoothing: Assumed share of flipped labels.
        average: Over what the mean of the likelihood term is: ``tokens`` of a micro-batch, or ``sequences``.
    """

    needs_reference: ClassVar[bool] = False
    extra_metric_names: ClassVar[tuple[str, ...]] = ("nll_loss",)
    beta: float = 0.1
    cpo_alpha: float = 1.0
    label_smoothing: float = 0.0
    average: Average = "tokens"

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.cpo_loss`."""
        return RF.cpo_loss(
            *pairs.policy_logps,
            pairs.chosen.lengths,
            beta=self.beta,
            cpo_alpha=self.cpo_alpha,
            label_smoothing=self.label_smoothing,
            average=self.average,
        )

    def rewards(self, completions: Completions) -> Tensor:
        """β times the log-probability."""
        return self.beta * completions.logps

    def extra_metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """The likelihood term, without its weight."""
        return {"nll_loss": _nll(pairs, self.average)}


@dataclass(frozen=True)
class SFTTerm(Objective):
    """The likelihood of the chosen completions; see :func:`lightning_rlhf.functional.sft_term`.

    A part of a :class:`Weighted` sum, against likelihood displacement. Its reward is the log-probability.

    Attributes:
        average: Over what the mean is: ``tokens`` of a micro-batch, or ``sequences``.
    """

    needs_reference: ClassVar[bool] = False
    extra_metric_names: ClassVar[tuple[str, ...]] = ("nll_loss",)
    average: Average = "tokens"

    def __call__(self, pairs: Pairs) -> Tensor:
        """One value per pair; see :func:`lightning_rlhf.functional.sft_term`."""
        return _nll(pairs, self.average)

    def rewards(self, completions: Completions) -> Tensor:
        """The log-probability."""
        return completions.logps

    def extra_metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """The term itself."""
        return {"nll_loss": _nll(pairs, self.average)}


def _nll(pairs: Pairs, average: Average) -> Tensor:
    return RF.sft_term(pairs.chosen.logps, pairs.chosen.lengths, average=average)
