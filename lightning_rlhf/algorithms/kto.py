"""Kahneman–Tversky optimisation on labelled answers."""

from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms.base import plain
from lightning_rlhf.algorithms.optimization import Optimization
from lightning_rlhf.algorithms.referenced import Referenced
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models import Policy

KTOLoss = Literal["kto", "apo_zero_unpaired"]
PAIR = 2


class KTO(Referenced):
    r"""Kahneman–Tversky optimisation (Ethayarajh et al., 2024) on answers labelled desirable or undesirable.

    $w_y (1 - \sigma(\pm \beta (r - z_0)))$ with $r = \log \frac{\pi(y)}{\pi_{ref}(y)}$, plus for desirable answers, the
    mean over the rows of an optimizer step. The reference point $z_0$ is the mean log-ratio of mismatched completions,
    at least 0 and without gradient: every prompt has one beside its labelled answer, and both share its computation.

    $z_0$ is about the micro-batch over all ranks, as in the paper's code. So a batch of 1 accumulated 8 times has eight
    estimates where a batch of 8 has one, and differs from it by their noise; with $z_0$ fixed both are equal.

    The reference is the policy as it starts; see :class:`~lightning_rlhf.DPO`. Dropout is off in policy and reference.

    Args:
        policy: A path or Hub id, :class:`Policy` settings, or a built Transformers or PEFT model.
        tokenizer: Needed with a built model; else the policy's own.
        loss_type: "kto", or "apo_zero_unpaired", which takes 0 for the reference point and needs no mismatched
            completions.
        beta: Strength of the KL anchor.
        desirable_weight: Of the losses of desirable answers; see :func:`lightning_rlhf.functional.kto_loss`.
        undesirable_weight: Of the losses of undesirable answers.
        optimization: Optimizer and schedule.
        reference: Another model as the reference, by path or settings; it need not equal the policy at step 0.
        precompute_reference: Compute the reference's log-probabilities once, before training, and keep them on
            disk: the reference then costs neither time nor memory in training. Needs a datamodule.
        cache_dir: Where they are kept, under a fingerprint of model, data and template.

    Raises:
        ValueError: If ``loss_type`` is unknown, ``beta`` is not positive or a weight is negative.
    """

    metric_names = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "kl",
        "entropy",
    )

    def __init__(
        self,
        policy: Policy | str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        loss_type: KTOLoss = "kto",
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        optimization: Optimization | None = None,
        reference: Policy | str | None = None,
        precompute_reference: bool = False,
        cache_dir: str = ".lightning_rlhf/reference",
    ) -> None:
        super().__init__(policy, tokenizer, optimization, reference, precompute_reference, cache_dir)
        if loss_type not in get_args(KTOLoss):
            raise ValueError(f"loss_type is {loss_type!r}; it must be one of {', '.join(get_args(KTOLoss))}")
        self.loss_type = loss_type
        self.hyperparameters = {
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
        }
        nothing = torch.zeros(0)
        RF.apo_zero_unpaired_loss(
            nothing, nothing, nothing, **self.hyperparameters
        )  # refuses what is out of range
        self.save_hyperparameters(
            {
                "policy": plain(policy),
                "loss_type": loss_type,
                **self.hyperparameters,
                "optimization": plain(self.optimization),
                "reference": plain(reference),
                "precompute_reference": precompute_reference,
                "cache_dir": cache_dir,
            }
        )
        if self.policy_settings is None:
            self.on_policy_loaded()

    def losses(self, batch: PackedBatch, stage: str) -> Tensor:
        """The loss of every labelled answer, ``(G,)``."""
        k = check_labelled(batch, mismatched=self.loss_type == "kto")
        # The reference first: what the policy keeps for its backward does not wait in memory beside it.
        ref_logps = self.reference_logps(batch, stage)
        # The reference point has no gradient, so only the labelled answers (the first of each group) are learnt from.
        tokens = self.policy(batch, with_entropy=True, learned=1)
        logps = RF.sum_by_sequence(tokens.logprobs, batch.target_lengths)
        if stage == "train" and not self._checked:
            self._assert_equal_at_start(logps.detach(), ref_logps, batch)
        answers, ref_answers, desirable = logps[::k], ref_logps[::k], batch.extras["label"].bool()
        point = self.reference_point(logps[1::k], ref_logps[1::k]) if k == PAIR else None
        losses = self.loss(answers, ref_answers, desirable, point)
        rewards = self.rewards(answers.detach(), ref_answers)
        values = {
            "loss": losses,
            "rewards/chosen": rewards[desirable],
            "rewards/rejected": rewards[~desirable],
            "logps/chosen": answers[desirable],
            "logps/rejected": answers[~desirable],
            "entropy": torch.cat(tokens.entropy.split(batch.num_targets)[::k]),
        }
        self.record(stage, batch, values if point is None else {**values, "kl": point})
        return losses

    def loss(self, logps: Tensor, ref_logps: Tensor, labels: Tensor, point: Tensor | None) -> Tensor:
        """The loss of labelled answers, ``(G,)``, by ``loss_type``."""
        if self.loss_type == "apo_zero_unpaired" or point is None:
            return RF.apo_zero_unpaired_loss(logps, ref_logps, labels, **self.hyperparameters)
        return RF.kto_loss(logps, ref_logps, labels, point, **self.hyperparameters)

    def reference_point(self, mismatched_logps: Tensor, mismatched_ref_logps: Tensor) -> Tensor:
        """The mean log-ratio of the mismatched completions of a micro-batch over all ranks, at least 0; a scalar."""
        spread = dist.is_initialized() and self.trainer.world_size > 1
        return RF.kto_reference_point(
            mismatched_logps, mismatched_ref_logps, sum_over_ranks=_all_reduced if spread else None
        )

    def rewards(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """The implicit rewards of completions, ``(N,)``."""
        return RF.implicit_rewards(logps, ref_logps, beta=self.hyperparameters["beta"])

    def derived_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """The margin between the mean rewards of both kinds of answers: nan where one of them did not occur."""
        return {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The summed loss of a micro-batch; see :meth:`Algorithm.step_mean`."""
        return self.step_mean(self.losses(batch, "train"), batch)

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The implicit reward of every labelled answer, ``(G,)``."""
        k = batch.num_completions // batch.num_groups
        logps = RF.sum_by_sequence(self.policy(batch).logprobs, batch.target_lengths)
        return self.rewards(logps, self.reference_logps(batch, "predict"))[::k]


def _all_reduced(parts: Tensor) -> Tensor:
    dist.all_reduce(parts)
    return parts


def check_labelled(batch: PackedBatch, *, mismatched: bool) -> int:
    """Refuse a batch that is no unpaired preference data.

    Args:
        batch: Any.
        mismatched: Whether a mismatched completion is needed beside the labelled one.

    Returns:
        Completions of a prompt: 2, or 1 where there are no mismatched ones.

    Raises:
        ValueError: If there are no labels, or a prompt has another number of completions.
    """
    if "label" not in batch.extras:
        raise ValueError(
            f"row {batch.row_ids[0]}: KTO needs a label for every answer (extras['label'], 1 or 0): use "
            "UnpairedDataModule, which also takes pairs"
        )
    wanted = {PAIR} if mismatched else {1, PAIR}
    for row, lengths in zip(batch.row_ids, batch.completion_lengths, strict=True):
        if len(lengths) not in wanted or len(lengths) != len(batch.completion_lengths[0]):
            raise ValueError(
                f"row {row}: KTO needs a labelled and a mismatched completion a prompt, got {len(lengths)}: use "
                "UnpairedDataModule, or without mismatched completions loss_type: apo_zero_unpaired"
            )
    return len(batch.completion_lengths[0])
