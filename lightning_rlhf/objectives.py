"""Preference objectives: each names a loss of :mod:`lightning_rlhf.functional` and holds its hyperparameters."""

import importlib
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lightning_rlhf import functional as RF

__all__ = ["Objective", "Sigmoid"]


@dataclass(frozen=True)
class Objective:
    """Base of all objectives over pairs of a chosen and a rejected completion."""

    def __call__(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
    ) -> Tensor:
        """One loss per pair, from log-probabilities of whole completions, each ``(N,)``."""
        raise NotImplementedError(f"{type(self).__name__} names no loss")

    def rewards(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """The reward that the policy implies for each completion, ``(N,)``."""
        raise NotImplementedError(f"{type(self).__name__} names no reward")

    def to_config(self) -> dict[str, Any]:
        """Plain values that a checkpoint or a YAML file can hold."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": asdict(self)}

    @staticmethod
    def from_config(config: dict[str, Any]) -> "Objective":
        """The objective that :meth:`to_config` described.

        Example:
            >>> Objective.from_config(Sigmoid(beta=0.3).to_config())
            Sigmoid(beta=0.3, label_smoothing=0.0)
        """
        module, _, name = config["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        if not issubclass(cls, Objective):
            raise TypeError(f"{config['class_path']} is no preference objective")
        return cls(**config["init_args"])


@dataclass(frozen=True)
class Sigmoid(Objective):
    """DPO's logistic loss; see :func:`lightning_rlhf.functional.dpo_loss`.

    Attributes:
        beta: Strength of the KL anchor.
        label_smoothing: Assumed share of flipped labels (cDPO).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
    ) -> Tensor:
        """One loss per pair; see :func:`lightning_rlhf.functional.dpo_loss`."""
        return RF.dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )

    def rewards(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """The implicit rewards; see :func:`lightning_rlhf.functional.implicit_rewards`."""
        return RF.implicit_rewards(logps, ref_logps, beta=self.beta)
