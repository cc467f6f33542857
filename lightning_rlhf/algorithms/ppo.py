"""Proximal policy optimisation against a reward, with a KL anchor; also RLOO, GRPO and REINFORCE."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms.base import plain
from lightning_rlhf.algorithms.estimators import GAE, Estimate, Estimator, Evidence
from lightning_rlhf.algorithms.kl_controller import KLControl, KLController
from lightning_rlhf.algorithms.online import Online, require_prompts
from lightning_rlhf.algorithms.optimization import Optimization, build_optimizer, build_schedule
from lightning_rlhf.algorithms.rollout import Micro, Rollout, shuffled
from lightning_rlhf.algorithms.rollout_steps import require_equal_passes, require_whole_rollouts, total_steps
from lightning_rlhf.algorithms.strategies import clip_by_strategy, reduces_every_backward, unsynchronised
from lightning_rlhf.algorithms.update import Update
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.data.mix import PRETRAIN, PROMPTS
from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from lightning_rlhf.generation import Generator, Sampling
from lightning_rlhf.models import Policy
from lightning_rlhf.models.critic import Critic, CriticKind, is_critic
from lightning_rlhf.models.settings import from_plain
from lightning_rlhf.rewards import Reward


class PPO(Online):
    r"""Proximal policy optimisation (Schulman et al., 2017; Ziegler et al., 2019; Ouyang et al., 2022).

    One ``training_step`` samples completions of the prompts, scores them, and takes
    ``num_epochs`` · ceil(N / ``minibatch_size``) optimizer steps on

    $-\min(\rho_t A_t, \mathrm{clip}(\rho_t, 1 ± \varepsilon) A_t) + c_v L^V_t - c_H H_t$

    where the reward of a token is −kl_coef · KL(π‖π_ref), and at the last one the score besides. ``estimator`` chooses
    the advantages: :class:`GAE` with a critic, or RLOO, GRPO, REINFORCE without one.

    Optimisation is manual: ``global_step`` counts optimizer steps, so that ``max_steps`` and ``every_n_train_steps``
    are multiples of the steps a rollout; clip by ``update.max_grad_norm`` and accumulate by
    ``update.micro_batch_size``, since the Trainer refuses ``gradient_clip_val`` and ``accumulate_grad_batches``. A
    checkpoint falls between rollouts, and a resumed run goes on bit for bit. Sampling is seeded by ``seed``, rollout
    and row: the same on any number of ranks.

    Args:
        policy: A path or Hub id, :class:`Policy` settings, or a built Transformers or PEFT model.
        reward: What scores a completion; see :mod:`lightning_rlhf.rewards`.
        tokenizer: Needed with a built model; else the policy's own.
        sampling: How completions are drawn; ``temperature`` also divides the logits of policy and reference. With
            ``top_p``, ``top_k`` or ``min_new_tokens`` the samples are from another distribution than the policy's.
        estimator: Of the advantages; by default :class:`GAE`.
        kl: The KL penalty, fixed or adaptive.
        update: How a rollout is learned from.
        critic: Of GAE: an ``adapter`` beside the policy's on one base, a ``head`` on the policy's own trunk, or a
            ``model`` of its own; by default an adapter where the policy is one, else a model.
        optimization: Optimizer and schedule.
        value_lr: Learning rate of the critic; by default the policy's.
        reference: Another model as the reference; by default the policy as it starts.
        generator: What samples; by default Transformers' ``generate``.
        seed: Of sampling and of the order of minibatches.
    """

    clip_remedy = "lower update.max_grad_norm"
    rollout_metrics = (
        *Online.rollout_metrics,
        "objective/kl_coef",
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "policy/ratio",
        "loss/policy_avg",
        "loss/value_avg",
        "value/clipfrac_avg",
        "loss/pretrain_avg",
    )

    def __init__(
        self,
        policy: Policy | str | nn.Module,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sampling: Sampling | None = None,
        estimator: Estimator | None = None,
        kl: KLControl | None = None,
        update: Update | None = None,
        critic: CriticKind | None = None,
        optimization: Optimization | None = None,
        value_lr: float | None = None,
        reference: Policy | str | None = None,
        generator: Generator | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, reward, tokenizer, sampling, optimization, reference, generator, seed)
        self.automatic_optimization = False
        self.estimator = (
            Estimator.from_config(estimator) if isinstance(estimator, Mapping) else estimator or GAE()
        )
        self.update = from_plain(Update, update) or Update()
        self.critic_kind: CriticKind | None = critic
        self._ratio_checked = False
        if value_lr is not None and value_lr <= 0:
            raise ValueError(f"value_lr must be positive, got {value_lr}; null takes optimization.lr")
        self.value_lr = value_lr
        self.rollout_size = 0
        self.kl = KLController(from_plain(KLControl, kl) or KLControl())
        if self.estimator.needs_groups and self.sampling.num_samples < 2:
            raise ValueError(
                f"{type(self.estimator).__name__} compares the samples of a prompt: sampling.num_samples must be at "
                f"least 2, got {self.sampling.num_samples}"
            )
        if not self.estimator.needs_values and critic is not None:
            raise ValueError(
                f"{type(self.estimator).__name__} has no critic: leave critic out, got {critic!r}"
            )
        self.save_hyperparameters(
            {
                "policy": plain(policy),
                "sampling": plain(self.sampling),
                "estimator": self.estimator.to_config(),
                "kl": plain(self.kl.control),
                "update": plain(self.update),
                "critic": critic,
                "optimization": plain(self.optimization),
                "value_lr": value_lr,
                "reference": plain(reference),
                "seed": seed,
            }
        )
        if self.policy_settings is None:
            self.on_policy_loaded()

    def on_policy_loaded(self) -> None:
        """Make reference, critic and reward around the untrained policy."""
        super().on_policy_loaded()
        if self.estimator.needs_values:
            self.critic = Critic(self.policy, self.critic_kind, self.policy_settings)

    def setup(self, stage: str) -> None:
        """Also clip where only the strategy can."""
        super().setup(stage)
        clip_by_strategy(self.trainer.strategy, self.update.max_grad_norm)

    # --- a rollout and what is learned from it --------------------------------------------------------------------

    def training_step(self, batch: PromptBatch | Mapping[str, Any], batch_idx: int) -> None:
        """Sample, score, estimate advantages, optimise."""
        rollout = self.sample(self.prompts_of(batch))
        text = self.text_of(batch)
        sharded = self.is_sharded or reduces_every_backward(self.trainer.strategy)
        require_equal_passes(self.trainer, len(rollout), self.update, sharded=sharded)
        self.rollout_size = len(rollout)
        rewards = self.score("train", rollout.samples)
        known = self.evaluate(rollout)
        estimate = self.estimate(rollout, rewards.total, known)
        kl = self.record_rollout("train", rollout, rewards, known)
        for epoch in range(self.update.num_epochs):
            moved = self.optimise(rollout, known, estimate, epoch, text)
            if self.update.max_approx_kl is not None and moved > self.update.max_approx_kl:
                break
        self.kl.update(self.mean_over_ranks(kl).item(), len(rollout) * self.trainer.world_size)
        self.finish_rollout(rollout)

    def in_order(self, rollout: Rollout) -> Iterator[PackedBatch]:
        """A rollout in forwards of bounded size, as while it is learned from, but for prompts that stay whole."""
        size = self.update.micro_batch_size or self.update.minibatch_size
        return rollout.in_order(size, self.update.micro_batch_tokens)

    @torch.no_grad()
    def evaluate(self, rollout: Rollout) -> dict[str, Tensor]:
        """What policy, reference and critic say of every token before anything is learned, each ``(M,)``."""

        def ask(batch: PackedBatch) -> dict[str, Tensor]:
            hidden = self.policy.hidden_states(batch)
            found = self.compare(hidden, batch)._asdict()
            return {**found, "values": self.critic(batch, hidden)} if self.estimator.needs_values else found

        parts = self.on_all_ranks(ask, self.in_order(rollout))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def estimate(self, rollout: Rollout, scores: Tensor, known: Mapping[str, Tensor]) -> Estimate:
        """Advantages and returns of every token."""
        exact = self.kl.control.estimator == "exact"
        evidence = Evidence(
            scores=scores,
            kl=known["kl"] if exact else RF.kl_k1(known["logprobs"], known["ref_logprobs"]),
            lengths=torch.tensor(rollout.lengths, device=scores.device),
            width=max(rollout.lengths),
            kl_coef=self.kl.coef,
            group_size=self.sampling.num_samples,
            values=known.get("values"),
            end_values=self.end_values(rollout),
            mean_over_ranks=self.mean_over_ranks,
        )
        penalty = -self.kl.coef * RF.sum_by_sequence(evidence.kl, evidence.lengths)
        self.record_values(
            "train",
            {
                "objective/kl_coef": torch.tensor(self.kl.coef),
                "objective/non_score_reward": penalty,
                "objective/rlhf_reward": scores + penalty,
            },
        )
        estimate = self.estimator(evidence)
        whiten = self.update.whiten_advantages
        if not (self.estimator.needs_values if whiten is None else whiten):
            return estimate
        mean = self.mean_over_ranks(estimate.advantages)
        variance = self.mean_over_ranks((estimate.advantages - mean).square())
        return Estimate((estimate.advantages - mean) * torch.rsqrt(variance + 1e-8), estimate.returns)

    @torch.no_grad()
    def end_values(self, rollout: Rollout) -> Tensor | None:
        """The critic's value after the last token of completions that were cut off, ``(N,)``."""
        if not (isinstance(self.estimator, GAE) and self.estimator.bootstrap_truncated):
            return None
        values = torch.cat(self.on_all_ranks(self.critic.at_ends, self.in_order(rollout)))
        return values * torch.tensor(rollout.samples.truncated, device=values.device)

    def optimise(
        self,
        rollout: Rollout,
        known: Mapping[str, Tensor],
        estimate: Estimate,
        epoch: int,
        text: Sequence[PromptGroup] = (),
    ) -> float:
        """One pass over a rollout; returns how far the policy has moved, in nats a token, mean over the pass."""
        tokens = {"logprobs": known["logprobs"], "advantages": estimate.advantages}
        if estimate.returns is not None:
            tokens |= {"values": known["values"], "returns": estimate.returns}
        if rollout.behaviour is not None:
            sampler = rollout.behaviour.to(self.device)
            tokens["weights"] = RF.truncated_importance_weights(
                known["logprobs"], sampler, cap=self.update.importance_cap
            )
        optimizer = cast(Optimizer, self.optimizers())
        moved: list[Tensor] = []
        seed = (self.seed, self.num_rollouts, epoch, self.global_rank)
        minibatches = shuffled(len(rollout), self.update.minibatch_size, seed)
        for place, minibatch in enumerate(minibatches):
            self.backward_text(text[place :: len(minibatches)], rollout, minibatch)
            chunks = rollout.cut(minibatch, self.update.micro_batch_size, self.update.micro_batch_tokens)
            for chunk in chunks:
                micro = rollout.select(chunk, tokens).to(self.device)
                with nullcontext() if chunk is chunks[-1] else unsynchronised(self.trainer.strategy):
                    moved.append(self.backward_micro(micro))
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()  # type: ignore[union-attr]
        return self.mean_over_ranks(torch.cat(moved)).item()

    def backward_micro(self, micro: Micro) -> Tensor:
        """Add the gradient of some completions; returns ½ (log π − log π_old)² of their tokens."""
        batch, known = micro
        hidden = self.policy.hidden_states(batch)
        losses, moved = self.policy_losses(batch, hidden, known)
        total = self.step_mean(self.averaged(losses, batch), batch)
        if "returns" in known:
            if self.critic_apart:
                self.manual_backward(total)
                total = total.new_zeros(())
            losses = self.update.value_coef * self.value_losses(batch, hidden, known)
            total = total + self.step_sum(self.averaged(losses, batch))
        self.manual_backward(total)
        return moved

    @property
    def critic_apart(self) -> bool:
        """Whether the critic has a backward of its own: its activations and the policy's are then never there together.

        Not where they share a trunk, nor where gradients are averaged over ranks: DDP expects all in one backward.
        """
        return self.critic.kind != "head" and not isinstance(self.trainer.strategy, ParallelStrategy)

    def averaged(self, losses: Tensor, batch: PackedBatch) -> Tensor:
        """What a step is the mean of: the losses of tokens, or their means over sequences."""
        if self.update.average == "tokens":
            return losses
        return RF.sum_by_sequence(losses, batch.target_lengths) / batch.target_lengths

    def policy_losses(
        self, batch: PackedBatch, hidden: Tensor, known: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The policy's loss of every token, and how far it has moved there, each ``(M,)``."""
        bonus = self.update.entropy_coef > 0
        now = self.policy.of_hidden(
            hidden, batch.targets, temperature=self.sampling.temperature, with_entropy=bonus
        )
        arguments = (known["logprobs"], known["advantages"])
        clip = self.update.clip_range
        losses = RF.ppo_policy_loss(now.logprobs, *arguments, clip_range=clip)
        detached = now.logprobs.detach()
        moved = RF.approx_kl(detached, known["logprobs"])
        self.assert_ratio_is_one(detached, known["logprobs"])
        self.record_values(
            "train",
            {
                "policy/approxkl_avg": moved,
                "policy/clipfrac_avg": RF.clip_fraction(detached, *arguments, clip_range=clip),
                "policy/ratio": RF.ratio(detached, known["logprobs"]),
                "loss/policy_avg": losses.detach(),
            },
        )
        losses = losses * known.get("weights", 1.0)
        if now.entropy is not None:
            losses = losses - self.update.entropy_coef * now.entropy
        return losses, moved

    def value_losses(self, batch: PackedBatch, hidden: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """The critic's loss of every token, ``(M,)``."""
        values = self.critic(batch, hidden)
        arguments = (known["values"], known["returns"])
        clip = self.update.value_clip_range
        losses = RF.ppo_value_loss(values, *arguments, value_clip_range=clip)
        clipped = RF.value_clip_fraction(values.detach(), *arguments, value_clip_range=clip)
        self.record_values("train", {"loss/value_avg": losses.detach(), "value/clipfrac_avg": clipped})
        return losses

    def prompts_of(self, batch: PromptBatch | Mapping[str, Any]) -> PromptBatch:
        """The prompts of a batch, which may have the text of PPO-ptx beside them."""
        if isinstance(batch, Mapping):
            prompts: PromptBatch = batch[PROMPTS]
            return prompts
        if self.update.pretrain_coef:
            raise ValueError(
                f"update.pretrain_coef is {self.update.pretrain_coef} and the data has no text beside its prompts: "
                "use PretrainingMix, or set it to 0"
            )
        return batch

    def text_of(self, batch: PromptBatch | Mapping[str, Any]) -> list[PromptGroup]:
        """The text of PPO-ptx in a batch; none where nothing is to be learned from it."""
        if not self.update.pretrain_coef or not isinstance(batch, Mapping):
            return []
        text: PackedBatch = batch[PRETRAIN]
        return text.groups()

    def backward_text(
        self, groups: Sequence[PromptGroup], rollout: Rollout, minibatch: Sequence[int]
    ) -> None:
        """Add the gradient of ``pretrain_coef`` times the mean cross-entropy of some text."""
        if not groups:
            return
        batch = pack(groups).to(self.device)
        losses = RF.sft_loss(self.policy(batch).logprobs)
        self.record_values("train", {"loss/pretrain_avg": losses.detach()})
        # The gradient of a step is divided by what was counted of the rollout: so this mean is multiplied by it.
        by_sequence = self.update.average == "sequences"
        counted = len(minibatch) if by_sequence else sum(rollout.lengths[index] for index in minibatch)
        with unsynchronised(self.trainer.strategy):
            self.manual_backward(self.update.pretrain_coef * counted * losses.mean())

    def assert_ratio_is_one(self, logprobs: Tensor, old_logprobs: Tensor) -> None:
        """At the very first step the policy is still the one that sampled, so every ratio is 1 up to rounding."""
        if self.global_step > 0 or self._ratio_checked:
            return
        self._ratio_checked = True
        gap = (logprobs - old_logprobs).abs().max().item()
        if gap > (0.2 if self._in_half(logprobs) else 1e-3):
            raise RuntimeError(
                f"at the first step a probability ratio is e^{gap:.3g} and should be 1: the policy that is trained is "
                "not the one that sampled. Is dropout on, or was the policy changed after the module was built?"
            )

    # --- steps ----------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The gradient of the mean over the step, stopped where it is not finite, and clipped."""
        super().on_before_optimizer_step(optimizer)
        if self.update.max_grad_norm is not None:
            self.configure_gradient_clipping(optimizer, self.update.max_grad_norm, "norm")

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """The mean of the elements of a tensor on all ranks, a scalar of its dtype."""
        sums = torch.stack([values.sum(dtype=torch.float64), values.new_full((), values.numel()).double()])
        if dist.is_initialized() and self.trainer.world_size > 1:
            dist.all_reduce(sums)
        return (sums[0] / sums[1]).to(values.dtype)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """AdamW over the policy, and over the critic with a learning rate of its own."""
        self._refuse_half_precision_weights()
        self._refuse_endless_schedule()
        lr = self.optimization.lr
        value_lr = lr if self.value_lr is None else self.value_lr
        optimizer = build_optimizer(
            self.named_parameters(),
            self.optimization,
            lambda name: value_lr if is_critic(name) else lr,
            self._shapes,
        )
        schedule = build_schedule(
            optimizer, self.optimization, lambda: total_steps(self.trainer, self.steps_of(self.rollout_size))
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def steps_of(self, size: int) -> int:
        """Optimizer steps of a rollout of so many completions, where no epoch is left out."""
        return self.update.num_epochs * -(-size // self.update.minibatch_size)

    def on_train_batch_start(self, batch: PromptBatch | Mapping[str, Any], batch_idx: int) -> None:
        """Before the first rollout: whether the Trainer counts in whole ones."""
        batch = self.prompts_of(batch)
        require_prompts(batch)
        if self.rollout_size == 0:
            varies = self.update.max_approx_kl is not None
            steps = self.steps_of(len(batch) * self.sampling.num_samples)
            steps = steps // self.update.num_epochs if varies else steps
            require_whole_rollouts(self.trainer, steps, varies=varies)
