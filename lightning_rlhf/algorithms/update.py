"""How PPO learns from a rollout."""

from dataclasses import dataclass
from typing import Literal

import torch

from lightning_rlhf import functional as RF


@dataclass(frozen=True)
class Update:
    """How a rollout is learned from.

    Attributes:
        num_epochs: Passes over the rollout, each in a fresh order.
        minibatch_size: Completions an optimizer step, on each rank.
        micro_batch_size: Completions a forward, at most; None for the whole minibatch.
        micro_batch_tokens: Tokens a forward, at most, each prompt counted once a completion; None for no budget.
        clip_range: ε of the policy's loss.
        value_clip_range: ε of the critic's loss.
        value_coef: Weight of the critic's loss.
        entropy_coef: Weight of the entropy bonus.
        max_grad_norm: The gradient is scaled down to this norm; None leaves it.
        max_approx_kl: No further epoch where the policy has moved further than this in one, in nats a token, as the
            mean of ½ (log π − log π_old)²; None for no limit.
        whiten_advantages: Mean 0 and variance 1 over the tokens of the rollout and all ranks; None for where there is a
            critic (estimators by sequence have a scale of their own).
        average: Of the losses of a step: over ``tokens``, or over ``sequences`` of the mean of their tokens.
        pretrain_coef: Weight of the language-modelling loss of PPO-ptx, a mean over tokens; needs
            :class:`~lightning_rlhf.data.PretrainingMix`. Its text is dealt out to the minibatches of a pass.
        importance_cap: Bounds π_old/π_sampler where another engine samples and reports its log-probabilities.
    """

    num_epochs: int = 4
    minibatch_size: int = 16
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    max_grad_norm: float | None = 1.0
    max_approx_kl: float | None = None
    whiten_advantages: bool | None = None
    average: Literal["tokens", "sequences"] = "tokens"
    pretrain_coef: float = 0.0
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        for name in ("num_epochs", "minibatch_size", "micro_batch_size", "micro_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"update.{name} must be at least 1, got {value}")
        for name in ("max_grad_norm", "max_approx_kl", "importance_cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"update.{name} must be positive, got {value}; null sets no limit")
        for name in ("value_coef", "entropy_coef", "pretrain_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"update.{name} must not be negative, got {getattr(self, name)}")
        if self.average not in ("tokens", "sequences"):
            raise ValueError(f"update.average must be tokens or sequences, got {self.average!r}")
        RF.ppo_policy_loss(*torch.zeros(3, 0), clip_range=self.clip_range)  # refuse what is out of range
        RF.ppo_value_loss(*torch.zeros(3, 0), value_clip_range=self.value_clip_range)
