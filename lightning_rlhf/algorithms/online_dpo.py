"""Online preference optimisation: the policy's own samples, ranked by a reward, as pairs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms.base import Algorithm, plain
from lightning_rlhf.algorithms.online import Online
from lightning_rlhf.algorithms.optimization import Optimization
from lightning_rlhf.algorithms.pairs import LENGTH_CORRELATION, pair_metric_names, pair_metrics
from lightning_rlhf.algorithms.rollout import Micro
from lightning_rlhf.algorithms.running_mean import RunningMean
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.generation import Generator, Sampling
from lightning_rlhf.metrics import LengthCorrelation
from lightning_rlhf.models import Policy, Reference
from lightning_rlhf.objectives import Completions, Objective, Sigmoid
from lightning_rlhf.rewards import Reward

TIED = "pairs/tied"


class OnlineDPO(Online):
    r"""Online DPO (Guo et al., 2024, "Direct language model alignment from online AI feedback").

    Each batch of prompts is answered by the policy, ``num_samples`` times; of each prompt the completion with the
    highest reward is chosen and the one with the lowest is rejected, and any preference objective is minimised on
    these pairs. A prompt whose completions all have the same reward is left out: ``pairs/tied`` is the share of those.
    A batch with nothing but ties has a gradient of 0.

    Optimisation is automatic: one batch a micro-batch, and ``accumulate_grad_batches`` and ``gradient_clip_val`` of
    the Trainer hold. Samples are seeded by ``seed``, optimizer step and row, so that they do not depend on how a step
    is cut. ``temperature`` divides the logits of policy and reference in the loss as well.

    The reference is made as in :class:`DPO`, also for an objective without one, since KL is measured against it.

    Args:
        policy: A path or Hub id, :class:`Policy` settings, or a built Transformers or PEFT model.
        reward: What ranks the completions of a prompt; see :mod:`lightning_rlhf.rewards`.
        tokenizer: Needed with a built model; else the policy's own.
        objective: The loss over pairs; by default :class:`lightning_rlhf.objectives.Sigmoid` with beta 0.1.
        sampling: How completions are drawn, at least two a prompt; by default two.
        optimization: Optimizer and schedule.
        reference: Another model as the reference; by default the policy as it starts.
        reference_update_steps: The reference becomes the policy before every so many optimizer steps (iterative DPO):
            KL and implicit rewards are then since the last time. None keeps it.
        generator: What samples; by default Transformers' ``generate``.
        seed: Of sampling.

    Raises:
        ValueError: If fewer than two completions a prompt are asked for, ``reference_update_steps`` is less than 1, or
            another model than the policy is to become the policy.
    """

    def __init__(
        self,
        policy: Policy | str | nn.Module,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase | None = None,
        objective: Objective | None = None,
        sampling: Sampling | None = None,
        optimization: Optimization | None = None,
        reference: Policy | str | None = None,
        reference_update_steps: int | None = None,
        generator: Generator | None = None,
        seed: int = 0,
    ) -> None:
        # Before the base class makes the metrics that the objective names; plain values need no module.
        self.objective = (
            Objective.from_config(objective) if isinstance(objective, Mapping) else objective or Sigmoid()
        )
        self.reference_update_steps = reference_update_steps
        sampling = Sampling(num_samples=2) if sampling is None else sampling
        super().__init__(policy, reward, tokenizer, sampling, optimization, reference, generator, seed)
        self._check(reference is not None)
        self.reward_mean = RunningMean() if self.objective.needs_reward_mean else None
        self.reference_step = 0
        self.save_hyperparameters(
            {
                "policy": plain(policy),
                "objective": self.objective.to_config(),
                "sampling": plain(self.sampling),
                "optimization": plain(self.optimization),
                "reference": plain(reference),
                "reference_update_steps": reference_update_steps,
                "seed": seed,
            }
        )
        if self.policy_settings is None:
            self.on_policy_loaded()

    def _check(self, has_reference: bool) -> None:
        if self.sampling.num_samples < 2:
            raise ValueError(
                "OnlineDPO pairs the best and the worst completion of a prompt: sampling.num_samples must be at least "
                f"2, got {self.sampling.num_samples}"
            )
        if self.reference_update_steps is None:
            return
        if self.reference_update_steps < 1:
            raise ValueError(
                f"reference_update_steps must be at least 1, got {self.reference_update_steps}; null keeps it"
            )
        if has_reference:
            raise ValueError(
                "reference_update_steps makes the policy its own reference: leave reference out, or the steps"
            )

    def new_reference(self) -> Reference:
        """As in DPO; where it is to follow the policy, it has weights of its own."""
        found = super().new_reference()
        if self.reference_update_steps is not None and found.kind == "base":
            return Reference(self.policy, kind="adapter")
        return found

    # --- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Sample, score, pair, and return the summed loss of the pairs; see :meth:`Algorithm.step_mean`."""
        self.update_reference()
        rollout = self.sample(batch)
        rewards = self.score("train", rollout.samples)
        known = self.compare_all(rollout)
        self.record_rollout("train", rollout, rewards, known)
        chosen = self.best_and_worst(rewards.total)
        # A backward has to run on every rank, whatever this one has to learn from: a batch of ties has one dummy pair.
        pairs = rollout.select(chosen or [0, 1], {"ref_logprobs": known["ref_logprobs"]})
        losses = self.pair_losses(Micro(pairs.batch.to(self.device), pairs.tokens), counted=bool(chosen))
        self.count_rollout(rollout)
        return self.step_mean(losses, pairs.batch)

    def best_and_worst(self, scores: Tensor) -> list[int]:
        """Places of the best and the worst completion of every prompt, one after the other, ties left out.

        Args:
            scores: Rewards, ``(N,)``, those of a prompt one after the other.
        """
        by_prompt = scores.view(-1, self.sampling.num_samples)
        tied = by_prompt.amax(1) == by_prompt.amin(1)
        self.record_values("train", {TIED: tied.float()})
        starts = torch.arange(len(by_prompt), device=scores.device) * by_prompt.shape[1]
        places = torch.stack([starts + by_prompt.argmax(1), starts + by_prompt.argmin(1)], dim=1)
        return places[~tied].flatten().tolist()

    def pair_losses(self, micro: Micro, *, counted: bool = True) -> Tensor:
        """The objective's loss of every pair, ``(N/2,)``.

        Args:
            micro: Groups of a chosen and a rejected completion, and the reference's log-probabilities.
            counted: Whether they are learned from; else the losses are cut down to none, with a gradient of 0.
        """
        batch, lengths = micro.batch, micro.batch.target_lengths
        tokens = self.policy(batch, temperature=self.sampling.temperature, with_entropy=True)
        logps = RF.sum_by_sequence(tokens.logprobs, lengths)
        ref_logps = RF.sum_by_sequence(micro.tokens["ref_logprobs"], lengths)
        completions = Completions(logps, lengths, ref_logps if self.objective.needs_reference else None)
        pairs = completions.pairs(None if self.reward_mean is None else self.reward_mean.value)
        losses: Tensor = self.objective(pairs)
        if not counted:
            return losses[:0]
        self.record_values("train", pair_metrics(self.objective, losses, completions, pairs, tokens, batch))
        if self.reward_mean is not None:
            self.reward_mean.update(self.objective.rewards(completions))
        return losses

    def update_reference(self) -> None:
        """Let the reference become the policy where its steps are over.

        At the beginning of a step, since a checkpoint is written before a module hears that the last one has ended.
        """
        every = self.reference_update_steps
        if every is None or self.global_step < self.reference_step + every:
            return
        assert self.reference is not None
        self.reference.follow()
        self.reference_step = self.global_step

    def end_step(self) -> None:
        """End the rollout: all batches of a step are one."""
        self.num_rollouts += 1
        if self.reward_mean is not None:
            self.reward_mean.commit()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Log as an algorithm with automatic optimisation does."""
        Algorithm.on_train_batch_end(self, outputs, batch, batch_idx)

    # --- metrics and checkpoints ----------------------------------------------------------------------------------

    @property
    def metric_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of every rollout, of every pair, and the share of ties."""
        return (*super().metric_names, *pair_metric_names(self.objective), TIED)

    def new_metric(self, name: str) -> Metric:
        """Means, and one correlation."""
        return LengthCorrelation() if name == LENGTH_CORRELATION else super().new_metric(name)

    @property
    def loaded_models(self) -> tuple[str, ...]:
        """Not the reference where it follows the policy: its weights are nowhere else."""
        follows = self.reference_update_steps is not None
        return tuple(name for name in super().loaded_models if not (follows and name == "reference."))

    def get_extra_state(self) -> dict[str, int]:
        """Also when the reference became the policy last."""
        return {**super().get_extra_state(), "reference_step": self.reference_step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Go on counting from a checkpoint."""
        super().set_extra_state(state)
        self.reference_step = state["reference_step"]
