"""Direct preference optimisation and, through its objective, its family."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms.base import plain
from lightning_rlhf.algorithms.optimization import Optimization
from lightning_rlhf.algorithms.pairs import LENGTH_CORRELATION, PAIR, pair_metric_names, pair_metrics
from lightning_rlhf.algorithms.preference_checks import (
    LARGE_DISPLACEMENT,
    check_options,
    warn_of_displacement,
)
from lightning_rlhf.algorithms.reference_cache import summed
from lightning_rlhf.algorithms.referenced import Referenced
from lightning_rlhf.algorithms.running_mean import RunningMean
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.metrics import LengthCorrelation
from lightning_rlhf.models import Policy
from lightning_rlhf.objectives import Completions, Objective, Sigmoid


class DPO(Referenced):
    r"""Direct preference optimisation (Rafailov et al., 2023) on pairs of a chosen and a rejected completion.

    $-\log \sigma(\beta [\log \frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log \frac{\pi(y_l)}{\pi_{ref}(y_l)}])$, the mean
    over the pairs of an optimizer step.

    The reference is the policy as it starts: its base without the adapter for a fresh LoRA, a frozen copy of the
    adapter where it starts from one, a frozen copy of the model in full fine-tuning. That both agree at step 0 is
    asserted. Dropout is off in policy and reference. An objective without a reference (ORPO, SimPO, CPO) makes none.

    Offline methods over-optimise too. ``logps/chosen_change`` is how much log-probability the chosen completions have
    gained since the reference, which falls under likelihood displacement: a warning, once, says what helps when the
    chosen completions of the validation data have lost more than 0.5 nats a token on average (each token then is 1.6
    times less likely). ``rewards/length_correlation`` is that of implicit reward and completion length.

    Args:
        policy: A path or Hub id, :class:`Policy` settings, or a built Transformers or PEFT model.
        tokenizer: Needed with a built model; else the policy's own.
        objective: The loss over pairs; by default :class:`lightning_rlhf.objectives.Sigmoid` with beta 0.1.
        optimization: Optimizer and schedule.
        reference: Another model as the reference, by path or settings; it need not equal the policy at step 0.
        precompute_reference: Compute the reference's log-probabilities once, before training, and keep them on
            disk: the reference then costs neither time nor memory in training. Needs a datamodule.
        cache_dir: Where they are kept, under a fingerprint of model, data and template.
        ld_alpha: Weight of the tokens past the shorter completion's length (LD-DPO), in [0, 1]; 1 changes nothing.
        wpo: Weight each pair by how likely the policy is to write its completions (WPO).

    Raises:
        ValueError: If a reference is asked for that the objective does not need, ``ld_alpha`` is out of range, or
            ``wpo`` is asked of an objective that sorts its batch.
    """

    def __init__(
        self,
        policy: Policy | str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        objective: Objective | None = None,
        optimization: Optimization | None = None,
        reference: Policy | str | None = None,
        precompute_reference: bool = False,
        cache_dir: str = ".lightning_rlhf/reference",
        ld_alpha: float = 1.0,
        wpo: bool = False,
    ) -> None:
        # Before the base class makes the metrics that the objective names; plain values need no module.
        self.objective = (
            Objective.from_config(objective) if isinstance(objective, Mapping) else objective or Sigmoid()
        )
        check_options(self.objective, reference is not None or precompute_reference, ld_alpha, wpo)
        self.ld_alpha, self.wpo = ld_alpha, wpo
        super().__init__(policy, tokenizer, optimization, reference, precompute_reference, cache_dir)
        self.reward_mean = RunningMean() if self.objective.needs_reward_mean else None
        self._warned = False
        self.save_hyperparameters(
            {
                "policy": plain(policy),
                "objective": self.objective.to_config(),
                "optimization": plain(self.optimization),
                "reference": plain(reference),
                "precompute_reference": precompute_reference,
                "cache_dir": cache_dir,
                "ld_alpha": ld_alpha,
                "wpo": wpo,
            }
        )
        if self.policy_settings is None:
            self.on_policy_loaded()

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares with a reference; else none is made."""
        return self.objective.needs_reference

    # --- steps ----------------------------------------------------------------------------------------------------

    def losses(self, batch: PackedBatch, stage: str) -> Tensor:
        """The objective's loss of every pair, ``(N/2,)``."""
        check_pairs(batch)
        # The reference first: what the policy keeps for its backward does not wait in memory beside it.
        ref_logps = self.reference_logps(batch, stage) if self.needs_reference else None
        tokens = self.policy(batch, with_entropy=True, with_collision=self.wpo)
        logps = summed(tokens.logprobs, batch, self.ld_alpha)
        completions = Completions(logps, batch.target_lengths, ref_logps)
        if stage == "train" and not self._checked and ref_logps is not None:
            self._assert_equal_at_start(logps.detach(), ref_logps, batch)
        pairs = completions.pairs(None if self.reward_mean is None else self.reward_mean.value)
        losses = self.objective(pairs)
        if self.wpo:
            assert tokens.log_collision is not None
            weights = RF.wpo_weights(tokens.logprobs, tokens.log_collision, batch.target_lengths)
            losses = losses * weights[0::PAIR] * weights[1::PAIR]
        self.record(stage, batch, pair_metrics(self.objective, losses, completions, pairs, tokens, batch))
        if stage == "train" and self.reward_mean is not None:
            self.reward_mean.update(self.rewards(completions))
        return losses

    @torch.no_grad()
    def rewards(self, completions: Completions) -> Tensor:
        """The implicit rewards of completions, ``(N,)``."""
        return self.objective.rewards(completions)

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> Tensor:
        r"""The implicit reward of any completions, ``(N,)``: $\beta (\log \pi - \log \pi_{ref})$.

        Without a reference it is the objective's own: β log π (CPO), or that a token (ORPO, SimPO). Rewards compare
        completions of one prompt.

        Raises:
            ValueError: If the reference was only computed in advance, for the training data.
        """
        if self.objective.needs_reference and self.reference is None:
            raise ValueError(
                "scoring new completions needs the reference itself, not stored log-probabilities: set "
                "precompute_reference: false"
            )
        logps = RF.sum_by_sequence(self.policy(batch).logprobs, batch.target_lengths)
        ref_logps = None if self.reference is None else self.reference(batch)
        return self.rewards(Completions(logps, batch.target_lengths, ref_logps))

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The summed loss of a micro-batch; see :meth:`Algorithm.step_mean`."""
        return self.step_mean(self.losses(batch, "train"), batch)

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The implicit reward of every completion, ``(N,)``; see :meth:`score`."""
        return self.score(batch)

    def end_step(self) -> None:
        """Let the rewards of this step count in their running mean."""
        if self.reward_mean is not None:
            self.reward_mean.commit()

    # --- metrics --------------------------------------------------------------------------------------------------

    @property
    def metric_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The objective's metrics, and those of every pair of completions."""
        return pair_metric_names(self.objective)

    def new_metric(self, name: str) -> Metric:
        """Means, and one correlation."""
        return LengthCorrelation() if name == LENGTH_CORRELATION else super().new_metric(name)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation data, and warn of likelihood displacement."""
        values = self._log_means("val")
        change = values.get("logps/chosen_change_per_token")
        if change is None or self._warned or not change < -LARGE_DISPLACEMENT:
            return
        self._warned = True
        warn_of_displacement(change)


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
