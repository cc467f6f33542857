"""Advantage estimators: small frozen settings, each of which names functions of :mod:`lightning_rlhf.functional`."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_rlhf import functional as RF


class Evidence(NamedTuple):
    """What an estimator knows of a rollout: N completions with M tokens in all.

    Attributes:
        scores: Of whole completions, ``(N,)``.
        kl: Estimate of KL(π‖π_ref) at each token, ``(M,)``, in nats.
        lengths: Tokens of each completion, ``(N,)``.
        width: The longest of these lengths, on the host.
        kl_coef: Reward that a nat costs.
        group_size: Completions of each prompt; those of a prompt follow one another.
        values: Before each token, ``(M,)``; None without a critic.
        end_values: After the last token of completions that were cut off, else 0, ``(N,)``; None to bootstrap nothing.
        mean_over_ranks: The mean of a tensor's elements over all ranks.
    """

    scores: Tensor
    kl: Tensor
    lengths: Tensor
    width: int
    kl_coef: float
    group_size: int
    values: Tensor | None
    end_values: Tensor | None
    mean_over_ranks: Callable[[Tensor], Tensor]


class Estimate(NamedTuple):
    """Advantages ``(M,)``, and what the critic should have said, ``(M,)``; None without one."""

    advantages: Tensor
    returns: Tensor | None


@dataclass(frozen=True)
class Estimator:
    """Base of all advantage estimators."""

    needs_values: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False

    def __call__(self, evidence: Evidence) -> Estimate:
        """Advantages of every token."""
        raise NotImplementedError(f"{type(self).__name__} estimates nothing")

    def to_config(self) -> dict[str, Any]:
        """Plain values that a checkpoint or a YAML file can hold."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": asdict(self)}

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> "Estimator":
        """The estimator that :meth:`to_config` described; a class of this module may be named without it.

        Raises:
            TypeError: If the class is no estimator.

        Example:
            >>> Estimator.from_config(GRPO(scale=False).to_config())
            GRPO(scale=False)
            >>> Estimator.from_config({"class_path": "RLOO"})
            RLOO()
        """
        module, _, name = config["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module or __name__), name)
        if not (isinstance(cls, type) and issubclass(cls, Estimator)):
            raise TypeError(f"{config['class_path']} is no advantage estimator")
        return cls(**(config.get("init_args") or {}))


@dataclass(frozen=True)
class GAE(Estimator):
    """Generalised advantage estimation with a critic; see :func:`lightning_rlhf.functional.gae`.

    Attributes:
        gamma: Discount per token.
        lam: λ: 0 trusts the critic, 1 the rewards.
        whiten_rewards: Scale token rewards to variance 1 without shifting their mean.
        bootstrap_truncated: A completion that was cut off is worth what the critic expects after its last token;
            else 0, as if it had ended.
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    bootstrap_truncated: bool = False
    needs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        nothing = torch.zeros(0, 0)
        RF.gae(
            nothing, nothing, nothing.bool(), gamma=self.gamma, lam=self.lam
        )  # refuse what is out of range

    def __call__(self, evidence: Evidence) -> Estimate:
        """Advantages and returns of every token."""
        assert evidence.values is not None
        kl, mask = RF.pad_by_sequence(evidence.kl, evidence.lengths, width=evidence.width)
        values, _ = RF.pad_by_sequence(evidence.values, evidence.lengths, width=evidence.width)
        rewards = RF.token_rewards(kl, evidence.scores, mask, kl_coef=evidence.kl_coef)
        if self.whiten_rewards:
            flat = rewards[mask]
            mean = evidence.mean_over_ranks(flat)
            variance = evidence.mean_over_ranks((flat - mean).square())
            rewards = rewards * torch.rsqrt(variance + 1e-8)
        found = RF.gae(rewards, values, mask, gamma=self.gamma, lam=self.lam, bootstrap=evidence.end_values)
        return Estimate(*(RF.unpad(padded, mask) for padded in found))


@dataclass(frozen=True)
class _BySequence(Estimator):
    """One advantage for all tokens of a completion, of its reward r − kl_coef · KL."""

    def __call__(self, evidence: Evidence) -> Estimate:
        """Advantages of every token."""
        kl = RF.sum_by_sequence(evidence.kl, evidence.lengths)
        rewards = RF.reinforce_advantages(evidence.scores, kl, kl_coef=evidence.kl_coef)
        advantages = self.of_rewards(rewards, evidence)
        return Estimate(advantages.repeat_interleave(evidence.lengths, output_size=len(evidence.kl)), None)

    def of_rewards(self, rewards: Tensor, evidence: Evidence) -> Tensor:
        """One advantage per completion, ``(N,)``."""
        raise NotImplementedError(f"{type(self).__name__} estimates nothing")


@dataclass(frozen=True)
class RLOO(_BySequence):
    """Leave one out: the other samples of the prompt are the baseline; see ``functional.rloo_advantages``."""

    needs_groups: ClassVar[bool] = True

    def of_rewards(self, rewards: Tensor, evidence: Evidence) -> Tensor:
        """One advantage per completion, ``(N,)``."""
        return RF.rloo_advantages(rewards, evidence.group_size)


@dataclass(frozen=True)
class GRPO(_BySequence):
    """Relative to the group, in its standard deviations; see :func:`lightning_rlhf.functional.grpo_advantages`.

    Attributes:
        scale: Divide by the standard deviation; without it, Dr. GRPO.
    """

    scale: bool = True
    needs_groups: ClassVar[bool] = True

    def of_rewards(self, rewards: Tensor, evidence: Evidence) -> Tensor:
        """One advantage per completion, ``(N,)``."""
        return RF.grpo_advantages(rewards, evidence.group_size, scale=self.scale)


@dataclass(frozen=True)
class Reinforce(_BySequence):
    """The reward of the whole completion, r − kl_coef · KL; see ``functional.reinforce_advantages``.

    Attributes:
        baseline: Subtract the mean over the rollout and all ranks.
    """

    baseline: bool = True

    def of_rewards(self, rewards: Tensor, evidence: Evidence) -> Tensor:
        """One advantage per completion, ``(N,)``."""
        return rewards - evidence.mean_over_ranks(rewards) if self.baseline else rewards
