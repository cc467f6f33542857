"""Direct preference optimisation and, through its objective, its family."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms.base import plain
from lightning_rlhf.algorithms.optimization import Optimization
from lightning_rlhf.algorithms.referenced import Referenced
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models import Policy
from lightning_rlhf.objectives import Objective, Sigmoid

PAIR = 2


class DPO(Referenced):
    r"""Direct preference optimisation (Rafailov et al., 2023) on pairs of a chosen and a rejected completion.

    $-\log \sigma(\beta [\log \frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log \frac{\pi(y_l)}{\pi_{ref}(y_l)}])$, the mean
    over the pairs of an optimizer step.

    The reference is the policy as it starts: its base without the adapter for a fresh LoRA, a frozen copy of the
    adapter where it starts from one, a frozen copy of the model in full fine-tuning. That both agree at step 0 is
    asserted. Dropout is off in policy and reference.

    Args:
        policy: A path or Hub id, :class:`Policy` settings, or a built Transformers or PEFT model.
        tokenizer: Needed with a built model; else the policy's own.
        objective: The loss over pairs; by default :class:`lightning_rlhf.objectives.Sigmoid` with beta 0.1.
        optimization: Optimizer and schedule.
        reference: Another model as the reference, by path or settings; it need not equal the policy at step 0.
        precompute_reference: Compute the reference's log-probabilities once, before training, and keep them on
            disk: the reference then costs neither time nor memory in training. Needs a datamodule.
        cache_dir: Where they are kept, under a fingerprint of model, data and template.
    """

    metric_names = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "mean_token_accuracy",
        "entropy",
    )

    def __init__(
        self,
        policy: Policy | str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        objective: Objective | None = None,
        optimization: Optimization | None = None,
        reference: Policy | str | None = None,
        precompute_reference: bool = False,
        cache_dir: str = ".lightning_rlhf/reference",
    ) -> None:
        super().__init__(policy, tokenizer, optimization, reference, precompute_reference, cache_dir)
        self.objective = (
            Objective.from_config(objective) if isinstance(objective, Mapping) else objective or Sigmoid()
        )
        self.save_hyperparameters(
            {
                "policy": plain(policy),
                "objective": self.objective.to_config(),
                "optimization": plain(self.optimization),
                "reference": plain(reference),
                "precompute_reference": precompute_reference,
                "cache_dir": cache_dir,
            }
        )
        if self.policy_settings is None:
            self.on_policy_loaded()

    # --- steps ----------------------------------------------------------------------------------------------------

    def losses(self, batch: PackedBatch, stage: str) -> Tensor:
        """The objective's loss of every pair, ``(N/2,)``."""
        check_pairs(batch)
        # The reference first: what the policy keeps for its backward does not wait in memory beside it.
        ref_logps = self.reference_logps(batch, stage)
        tokens = self.policy(batch, with_entropy=True)
        logps = RF.sum_by_sequence(tokens.logprobs, batch.target_lengths)
        if stage == "train" and not self._checked:
            self._assert_equal_at_start(logps.detach(), ref_logps, batch)
        losses = self.objective(logps[0::PAIR], logps[1::PAIR], ref_logps[0::PAIR], ref_logps[1::PAIR])
        rewards = self.rewards(logps.detach(), ref_logps)
        chosen, rejected = rewards[0::PAIR], rewards[1::PAIR]
        values = {
            "loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": RF.pairwise_accuracy(chosen, rejected),
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps[0::PAIR],
            "logps/rejected": logps[1::PAIR],
            "mean_token_accuracy": torch.cat(tokens.correct.split(batch.num_targets)[0::PAIR]).float(),
            "entropy": tokens.entropy,
        }
        self.record(stage, batch, values)
        return losses

    def rewards(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """The implicit rewards of completions, ``(N,)``."""
        return self.objective.rewards(logps, ref_logps)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The summed loss of a micro-batch; see :meth:`Algorithm.step_mean`."""
        return self.step_mean(self.losses(batch, "train"), batch)

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The implicit reward of every completion, ``(N,)``."""
        logps = RF.sum_by_sequence(self.policy(batch).logprobs, batch.target_lengths)
        return self.rewards(logps, self.reference_logps(batch, "predict"))


def check_pairs(batch: PackedBatch) -> None:
    """Refuse a batch whose groups are not pairs.

    Raises:
        ValueError: If a prompt has another number of completions than two, or a labelled and a mismatched one.
    """
    if "label" in batch.extras:
        raise ValueError(
            f"row {batch.row_ids[0]}: this is unpaired data, whose second completion belongs to another prompt: DPO "
            "needs pairs: use PreferenceDataModule"
        )
    for row, lengths in zip(batch.row_ids, batch.completion_lengths, strict=True):
        if len(lengths) != PAIR:
            raise ValueError(
                f"row {row}: DPO needs two completions a prompt (chosen, rejected), got {len(lengths)}: use "
                "PreferenceDataModule with pairs; rankings are for a RewardModel"
            )
