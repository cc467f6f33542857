"""Algorithms that sample from the policy they train: a rollout, its scores, and how far it is from the reference."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms.optimization import Optimization
from lightning_rlhf.algorithms.referenced import Referenced
from lightning_rlhf.algorithms.rollout import Rollout, Scored, prompt_seeds, sample_rollout
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.functional import TokenComparison
from lightning_rlhf.generation import Generator, HFGenerator, Sampling
from lightning_rlhf.models import Policy
from lightning_rlhf.models.settings import from_plain
from lightning_rlhf.rewards import Reward, RewardResult, Samples, score

KL, K1, K3 = "objective/kl", "objective/kl_k1", "objective/kl_k3"
GREEDY = "objective/scores_greedy"

Result = TypeVar("Result")


def require_prompts(batch: Any) -> None:  # noqa: ANN401 - whatever a loader gave
    """Refuse a batch of other data than prompts.

    Raises:
        TypeError: If it is one.
    """
    if not isinstance(batch, PromptBatch):
        raise TypeError(
            f"an algorithm that samples takes prompts, and the data gave a {type(batch).__name__}: use "
            "PromptDataModule, which takes preference data as well, or a DataLoader with PromptCollator"
        )


class Online(Referenced):
    """Base of the algorithms that sample.

    Args:
        policy: A path or Hub id, :class:`Policy` settings, or a built Transformers or PEFT model.
        reward: What scores a completion.
        tokenizer: Needed with a built model; else the policy's own.
        sampling: How completions are drawn.
        optimization: Optimizer and schedule.
        reference: Another model as the reference, by path or settings.
        generator: What samples.
        seed: Of sampling.
    """

    rollout_metrics: tuple[str, ...] = (
        KL,
        K1,
        K3,
        "objective/entropy",
        "objective/scores",
        GREEDY,
        "completions/mean_length",
        "completions/clipped_ratio",
        "time/generation_share",
    )

    def __init__(
        self,
        policy: Policy | str | nn.Module,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase | None,
        sampling: Sampling | None,
        optimization: Optimization | None,
        reference: Policy | str | None,
        generator: Generator | None,
        seed: int,
    ) -> None:
        if not isinstance(reward, Reward):
            raise TypeError(
                f"reward must be a Reward, got {type(reward).__name__}: put a function into rewards.FunctionReward, "
                "and a reward model's path into rewards.RewardModelReward"
            )
        # Before the base class makes the metrics; plain values need no module.
        self._reward_parts = tuple(f"rewards/{name}" for name in reward.part_names)
        super().__init__(policy, tokenizer, optimization, reference, precompute_reference=False, cache_dir="")
        self.reward = reward
        self.sampling = from_plain(Sampling, sampling) or Sampling()
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be positive: greedy samples leave nothing to compare")
        self.generator = generator or HFGenerator()
        self.seed = seed
        self.num_rollouts = 0
        self.last_validation: list[dict[str, Any]] = []
        self.last_rollout: Scored | None = None
        self._began = self._generated = 0.0

    @property
    def metric_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """What every rollout is measured by, and the parts of the reward."""
        return (*self.rollout_metrics, *self._reward_parts)

    def on_policy_loaded(self) -> None:
        """Make the reference, and tell the reward what samples."""
        super().on_policy_loaded()
        self.reward.attach(self.policy, self.tokenizer)

    # --- a rollout ------------------------------------------------------------------------------------------------

    def sample(self, batch: PromptBatch, sampling: Sampling | None = None) -> Rollout:
        """Sample completions of prompts, seeded by rollout and row."""
        require_prompts(batch)
        self._began = time.perf_counter()
        seeds = prompt_seeds(self.seed, self.num_rollouts, batch.row_ids)
        rollout = sample_rollout(
            batch, self.generator, self.policy, self.tokenizer, sampling or self.sampling, seeds
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of the KV cache, of sizes that the update never asks for
        self._generated = time.perf_counter() - self._began
        return rollout

    def score(self, stage: str, samples: Samples) -> RewardResult:
        """Rewards of samples, ``(N,)``, on the module's device; the parts are recorded under their names."""
        found = score(self.reward, samples)
        self.record_values(stage, {f"rewards/{name}": part for name, part in found.parts.items()})
        return replace(found, total=found.total.to(self.device))

    def compare(self, hidden: Tensor, batch: PackedBatch) -> TokenComparison:
        """Policy and reference at every token; that they agree at step 0 is asserted."""
        assert self.reference is not None
        found = self.reference.compare(hidden, batch, temperature=self.sampling.temperature)
        if not self._checked:
            logps, ref_logps = (
                RF.sum_by_sequence(values, batch.target_lengths)
                for values in (found.logprobs, found.ref_logprobs)
            )
            self._assert_equal_at_start(logps, ref_logps, batch)
        return found

    @torch.no_grad()
    def compare_all(self, rollout: Rollout) -> dict[str, Tensor]:
        """What policy and reference say of every token of all samples, each ``(M,)``."""
        batches = rollout.in_order(self.sampling.batch_size)
        parts = self.on_all_ranks(
            lambda packed: self.compare(self.policy.hidden_states(packed), packed), batches
        )
        return dict(zip(TokenComparison._fields, map(torch.cat, zip(*parts, strict=True)), strict=True))

    def on_all_ranks(
        self, run: Callable[[PackedBatch], Result], batches: Iterable[PackedBatch]
    ) -> list[Result]:
        """Run forwards without gradient on batches, moved to the device.

        Where weights are sharded, every rank runs as many as the one that has most: each forward gathers weights from
        all ranks.
        """
        found, batch = [], None
        for packed in batches:
            batch = packed.to(self.device)
            found.append(run(batch))
        assert batch is not None
        if self.is_sharded:
            most = torch.tensor(len(found), device=self.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            for _ in range(int(most) - len(found)):
                run(batch)
        return found

    def record_rollout(
        self, stage: str, rollout: Rollout, rewards: RewardResult, known: Mapping[str, Tensor]
    ) -> Tensor:
        """Record what a rollout is measured by; returns KL(π‖π_ref) of each completion, ``(N,)``, in nats."""
        lengths = torch.tensor(rollout.lengths, device=self.device)
        k1 = RF.kl_k1(known["logprobs"], known["ref_logprobs"])
        k3 = RF.kl_k3(known["logprobs"], known["ref_logprobs"])
        kl, k1, k3 = (RF.sum_by_sequence(values, lengths) for values in (known["kl"], k1, k3))
        if stage == "train":
            self.last_rollout = Scored(rollout, rewards, kl)
        self.record_values(
            stage,
            {
                KL: kl,
                K1: k1,
                K3: k3,
                "objective/entropy": known["entropy"],
                "objective/scores": rewards.total,
                "completions/mean_length": lengths.float(),
                "completions/clipped_ratio": torch.tensor(rollout.samples.truncated).float(),
            },
        )
        return kl

    def finish_rollout(self, rollout: Rollout) -> None:
        """Count it, and log its means."""
        self.num_rollouts += 1
        self.count_rollout(rollout)
        self._log_means("train")

    def count_rollout(self, rollout: Rollout) -> None:
        """Record its tokens, and what share of the time since it began was generation."""
        share = self._generated / max(time.perf_counter() - self._began, 1e-9)
        self.record_values("train", {"time/generation_share": torch.tensor(share)})
        self.num_tokens.update(sum(rollout.lengths))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Every rollout is logged as it ends."""
        self._stepped = False

    # --- validation -----------------------------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Sample held-out prompts and score the samples, at the training's temperature and greedily."""
        self._evaluate("val", batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:  # type: ignore[override]
        """As in validation."""
        self._evaluate("test", batch)

    @torch.no_grad()
    def _evaluate(self, stage: str, batch: PromptBatch) -> None:
        sampled = self.sample(batch, replace(self.sampling, num_samples=1))
        greedy = self.sample(batch, replace(self.sampling, num_samples=1, temperature=0.0))
        rewards = self.score(stage, sampled.samples)
        greedy_scores = score(self.reward, greedy.samples).total
        known = self.compare_all(sampled)
        kl = self.record_rollout(stage, sampled, rewards, known)
        self.record_values(stage, {GREEDY: greedy_scores})
        for i, prompt in enumerate(sampled.samples.prompts):
            self.last_validation.append(
                {
                    "row": batch.row_ids[i],
                    "prompt": prompt,
                    "completion": sampled.samples.completions[i],
                    "score": rewards.total[i].item(),
                    "kl": kl[i].item(),
                    "greedy": greedy.samples.completions[i],
                    "greedy_score": greedy_scores[i].item(),
                }
            )

    def on_validation_epoch_start(self) -> None:
        """Forget the samples of the last validation."""
        self.last_validation = []

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[str]:
        """One completion a sample, as text, those of a prompt one after the other."""
        return list(self.sample(batch).samples.completions)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int]:
        """How many rollouts there were: what the next one is seeded by."""
        return {"num_rollouts": self.num_rollouts}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Go on counting from a checkpoint."""
        self.num_rollouts = state["num_rollouts"]
