"""What every objective is: a loss over pairs, a reward it implies, and what is logged."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_rlhf import functional as RF
from lightning_rlhf.functional.divergence import Divergence
from lightning_rlhf.objectives.pairs import Completions, Pairs, ref_logps_of

PACKAGE = "lightning_rlhf.objectives"
DISPLACEMENT = ("logps/chosen_change", "logps/chosen_change_per_token")


@dataclass(frozen=True)
class Objective:
    """Base of all objectives over pairs of a chosen and a rejected completion.

    A new one is a function of :mod:`lightning_rlhf.functional` and a frozen dataclass here that holds its
    hyperparameters and calls it.

    Attributes:
        needs_reference: Whether log-probabilities under a reference are read; else none is ever made.
        needs_reward_mean: Whether the running mean of rewards is read.
        sorts_batch: Whether losses come in another order than the pairs, so that no weight a pair fits them.
        extra_metric_names: What is logged beside rewards and log-probabilities.
    """

    needs_reference: ClassVar[bool] = True
    needs_reward_mean: ClassVar[bool] = False
    sorts_batch: ClassVar[bool] = False
    extra_metric_names: ClassVar[tuple[str, ...]] = ()

    def __call__(self, pairs: Pairs) -> Tensor:
        """One loss per pair, ``(N,)``."""
        raise NotImplementedError(f"{type(self).__name__} names no loss")

    def rewards(self, completions: Completions) -> Tensor:
        """The reward that the policy implies for each completion, ``(N,)``."""
        raise NotImplementedError(f"{type(self).__name__} names no reward")

    def logps(self, completions: Completions) -> Tensor:
        """The log-probabilities that are logged, ``(N,)``: sums over tokens, or means where the loss reads means."""
        return completions.logps

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What :meth:`metrics` returns, and the loss."""
        names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
        displacement = DISPLACEMENT if self.needs_reference else ()
        return ("loss", *names, "logps/chosen", "logps/rejected", *displacement, *self.extra_metric_names)

    @torch.no_grad()
    def metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Values to be averaged over pairs, by TRL's names where it has one; each ``(N,)``."""
        chosen, rejected = self.rewards(pairs.chosen), self.rewards(pairs.rejected)
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": RF.pairwise_accuracy(chosen, rejected),
            "rewards/margins": chosen - rejected,
            "logps/chosen": self.logps(pairs.chosen),
            "logps/rejected": self.logps(pairs.rejected),
        }
        if self.needs_reference:
            change = pairs.chosen.logps - ref_logps_of(pairs.chosen)
            per_token = change / pairs.chosen.lengths.clamp(min=1)
            values |= dict(zip(DISPLACEMENT, (change, per_token), strict=True))
        return values | self.extra_metrics(pairs)

    def extra_metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Values of :attr:`extra_metric_names`, each ``(N,)``."""
        return {}

    def to_config(self) -> dict[str, Any]:
        """Plain values that a checkpoint or a YAML file can hold."""
        module = type(self).__module__
        home = PACKAGE if module.startswith(f"{PACKAGE}.") else module
        return {
            "class_path": f"{home}.{type(self).__qualname__}",
            "init_args": {f.name: _to_plain(getattr(self, f.name)) for f in fields(self)},
        }

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> "Objective":
        """The objective that :meth:`to_config` described; a class of this package may be named without its module.

        Raises:
            TypeError: If the class is no objective.

        Example:
            >>> from lightning_rlhf.objectives import Hinge
            >>> Objective.from_config(Hinge(beta=0.3).to_config()) == Hinge(beta=0.3)
            True
            >>> Objective.from_config({"class_path": "SimPO", "init_args": {"beta": 2.0, "gamma": 1.0}})
            SimPO(beta=2.0, gamma=1.0, label_smoothing=0.0)
        """
        module, _, name = config["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module or PACKAGE), name)
        if not (isinstance(cls, type) and issubclass(cls, Objective)):
            raise TypeError(f"{config['class_path']} is no preference objective")
        arguments = config.get("init_args") or {}
        return cls(**{key: _from_plain(value) for key, value in arguments.items()})


@dataclass(frozen=True)
class WithReference(Objective):
    """Base of objectives whose reward is β (log π − log π_ref).

    Attributes:
        beta: Strength of the KL anchor.
    """

    beta: float = 0.1

    def rewards(self, completions: Completions) -> Tensor:
        """The implicit rewards; see :func:`lightning_rlhf.functional.implicit_rewards`."""
        return RF.implicit_rewards(completions.logps, ref_logps_of(completions), beta=self.beta)


@dataclass(frozen=True)
class Margin(WithReference):
    """Base of objectives that see the difference of both log-ratios, and so work under any f-divergence.

    Attributes:
        divergence: ``reverse_kl``, ``forward_kl``, ``js`` or ``alpha``; see
            :func:`lightning_rlhf.functional.divergence_scores`.
        divergence_alpha: α of ``alpha``.
    """

    divergence: Divergence = field(default="reverse_kl", kw_only=True)
    divergence_alpha: float = field(default=0.5, kw_only=True)

    def scores(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of the loss: a divergence's scores stand where log-ratios would, against a reference of 0."""
        if self.divergence == "reverse_kl":
            return pairs.logps
        chosen, rejected, ref_chosen, ref_rejected = pairs.logps
        chosen, rejected = (
            RF.divergence_scores(ratios, divergence=self.divergence, alpha=self.divergence_alpha)
            for ratios in (chosen - ref_chosen, rejected - ref_rejected)
        )
        return chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected)


def _to_plain(value: Any) -> Any:  # noqa: ANN401 - any field
    if isinstance(value, Objective):
        return value.to_config()
    return [_to_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _from_plain(value: Any) -> Any:  # noqa: ANN401 - any plain value
    if isinstance(value, Mapping) and "class_path" in value:
        return Objective.from_config(value)
    return [_from_plain(item) for item in value] if isinstance(value, tuple | list) else value
