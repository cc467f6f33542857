"""Reward models: a scalar head on a language model, alone or as an ensemble, fitted to ranked completions."""

import hashlib
from typing import cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms.base import Algorithm, metric_key, plain
from lightning_rlhf.algorithms.odin import ODIN, LengthHeads
from lightning_rlhf.algorithms.optimization import Optimization
from lightning_rlhf.algorithms.token_heads import TokenHead, TokenHeads
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.metrics import CalibrationError, LengthCorrelation, LongerWins, MeanAndStd
from lightning_rlhf.models import Policy, load_language_model
from lightning_rlhf.models.adapters import add_adapter, copy_adapter, is_fresh, member_adapter
from lightning_rlhf.models.language_model import disable_dropout, freeze_vocabulary_head
from lightning_rlhf.models.loading import POLICY_ADAPTER
from lightning_rlhf.models.reward_directory import read_head
from lightning_rlhf.models.scorer import Aggregation, Ensemble, ScoreHead, Scorer
from lightning_rlhf.models.settings import from_plain

EVALUATION: dict[str, type[Metric]] = {
    "calibration_error": CalibrationError,
    "length_correlation": LengthCorrelation,
    "longer_wins": LongerWins,
}
"""What is measured in evaluation only, on the mean score over the members."""


class RewardModel(Algorithm):
    r"""A reward model of ranked completions (Stiennon et al., 2020; Ouyang et al., 2022, equation 1).

    $-\frac{1}{C_x} \sum_{(w, l)} \log \sigma(s(x, y_w) - s(x, y_l) - m)$ for every prompt x, over its $C_x$ comparisons
    of two completions that differ in rank; the mean over the prompts of an optimizer step. So each prompt weighs the
    same, however many completions it has, and they are all in one forward that computes the prompt once.

    The score is read at the last token of a completion. Every validation epoch of a fit sets the scale: mean 0 and
    standard deviation 1 over all completions of the validation data; it is kept with the head, and used by
    ``predict`` and wherever the model serves as a reward.

    Logs ``loss``, ``accuracy`` (ties count one half), ``margin``, ``mean_reward``, ``min_reward``, ``max_reward``
    (the last two as means over batches, as TRL's) and, of an ensemble, ``disagreement``: the standard deviation over
    the members' scores. All of these are of raw scores, averaged over the members. In evaluation also
    ``calibration_error`` of σ(margin), ``length_correlation`` of scores and lengths in tokens, and ``longer_wins``: the
    accuracy that preferring the longer completion would have.

    Args:
        policy: The language model under the head: a path or Hub id, :class:`Policy` settings, or a built
            Transformers or PEFT model. A reward model directory brings its head.
        tokenizer: Needed with a built model; else the policy's own.
        optimization: Optimizer and schedule.
        center_rewards_coef: Weight of $(s_w + s_l)^2$, which keeps scores near 0 (Eisenstein et al., 2023); 0 for none.
        num_members: Members of the ensemble. With LoRA they are adapters on one base; else models of their own.
        member_share: Share of the prompts that each member is trained on, drawn by ``member_seed`` for each anew.
        member_seed: Of these draws.
        shared_head_init: All heads start the same, which averaging the members' weights asks for (WARM, Ramé et
            al., 2024).
        aggregation: How the members' scores become one.
        token_head: Train a head beside each member's own that rewards single tokens, and draw the score to their sum;
            checkpoints have it, what is exported has not. Where single words decide, the score learns more from the
            same data. ``train/loss`` has its losses too, ``val/loss`` is of the score alone.
        odin: Train a length head beside each member's own, which takes what is only length and is not part of the
            scores: the ranking loss is of both heads' sum, everything that is logged, kept and exported of the
            member's own. Its correlations are over the completions of a micro-batch, so accumulation is not exact.
    """

    metric_names = (
        "loss",
        "accuracy",
        "margin",
        "mean_reward",
        "min_reward",
        "max_reward",
        "disagreement",
    )

    def __init__(
        self,
        policy: Policy | str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        optimization: Optimization | None = None,
        center_rewards_coef: float = 0.0,
        num_members: int = 1,
        member_share: float = 1.0,
        member_seed: int = 0,
        shared_head_init: bool = False,
        aggregation: Aggregation | None = None,
        odin: ODIN | None = None,
        token_head: TokenHead | None = None,
    ) -> None:
        super().__init__(policy, tokenizer, optimization)
        _check_settings(center_rewards_coef, num_members, member_share)
        self.center_rewards_coef = center_rewards_coef
        self.num_members = num_members
        self.member_share = member_share
        self.member_seed = member_seed
        self.shared_head_init = shared_head_init
        self.aggregation = from_plain(Aggregation, aggregation) or Aggregation()
        self.odin = from_plain(ODIN, odin)
        self.length_heads: LengthHeads | None = None
        self.token_head = from_plain(TokenHead, token_head)
        self.token_heads: TokenHeads | None = None
        if self.odin is not None and self.token_head is not None:
            raise ValueError("odin and token_head both train a second head: give one of them")
        self.reference_scores = nn.ModuleList(MeanAndStd() for _ in range(num_members))
        self.evaluation = nn.ModuleDict(
            {
                metric_key(stage, name): metric()
                for stage in ("val", "test")
                for name, metric in EVALUATION.items()
            }
        )
        self.save_hyperparameters(
            {
                "policy": plain(policy),
                "optimization": plain(self.optimization),
                "center_rewards_coef": center_rewards_coef,
                "num_members": num_members,
                "member_share": member_share,
                "member_seed": member_seed,
                "shared_head_init": shared_head_init,
                "aggregation": plain(self.aggregation),
                "odin": plain(self.odin),
                "token_head": plain(self.token_head),
            }
        )
        if self.policy_settings is None:
            self.on_policy_loaded()

    def configure_model(self) -> None:
        """Load the policy and its heads, and shard them where the strategy does.

        Raises:
            ValueError: If there are length heads to be sharded: they need their weights outside of a forward.
        """
        super().configure_model()
        if self.is_sharded and self.odin is not None:
            raise ValueError(
                f"odin does not train under {type(self.trainer.strategy).__name__}: use DDP, or leave odin out"
            )

    # --- members --------------------------------------------------------------------------------------------------

    def on_policy_loaded(self) -> None:
        """Give the model its heads, and an ensemble its members."""
        disable_dropout(self.policy)
        freeze_vocabulary_head(self.policy)
        kept = None if self.policy_settings is None else read_head(self.policy_settings.path)
        width = self.policy.config.get_text_config().hidden_size
        heads = [ScoreHead(width) for _ in range(self.num_members)]
        if kept is not None or self.shared_head_init:
            for head in heads:
                head.load_state_dict((kept or heads[0]).state_dict())
        members = [self._member(index, head) for index, head in enumerate(heads)]
        self.ensemble = Ensemble(members, self.aggregation)
        if self.odin is not None:
            self.length_heads = LengthHeads(self.odin, heads)
        if self.token_head is not None:
            self.token_heads = TokenHeads(self.token_head, heads)

    def _member(self, index: int, head: ScoreHead) -> Scorer:
        model = self.policy
        if index == 0:
            adapter = POLICY_ADAPTER if isinstance(model.model, PeftModel) and self.num_members > 1 else None
            return Scorer(model, head, adapter, owns=False)
        if isinstance(model.model, PeftModel):
            name = member_adapter(index)
            if is_fresh(model.model):
                add_adapter(model.model, name, model.model.peft_config[POLICY_ADAPTER], trainable=True)
            else:
                copy_adapter(model.model, name, trainable=True)
            return Scorer(model, head, name, owns=False)
        if self.policy_settings is None:
            raise ValueError(
                f"num_members {self.num_members} with a built model that has no adapter: give a path, so that every "
                "member can be loaded, or a PEFT model, whose members are adapters"
            )
        own = load_language_model(self.policy_settings)
        disable_dropout(own)
        freeze_vocabulary_head(own)
        return Scorer(own, head)

    def kept_losses(self, losses: Tensor, row_ids: tuple[int, ...]) -> Tensor:
        """Of the losses ``(members, G)``, those of prompts in each member's share, in one row."""
        if self.num_members == 1 or self.member_share == 1.0:
            return losses.flatten()
        kept = [
            member * len(row_ids) + place
            for member in range(self.num_members)
            for place, row in enumerate(row_ids)
            if in_share(row, member, self.member_share, self.member_seed)
        ]
        return losses.flatten()[torch.tensor(kept, dtype=torch.long, device=losses.device)]

    # --- steps ----------------------------------------------------------------------------------------------------

    def losses(self, batch: PackedBatch, stage: str) -> Tensor:
        """One loss per member and prompt, ``(members, G)``."""
        pairs = RF.comparisons(group_sizes(batch), ranks(batch))
        margin = batch.extras.get("margin")
        if margin is not None:
            margin = margin.repeat_interleave(pairs.sizes, output_size=len(pairs.better))
        lengths = completion_lengths(batch)
        sums = None
        if self.token_heads is not None and stage == "train":
            tokens = [scorer.tokens(batch) for scorer in self.ensemble.members]
            ends = [hidden[lengths.cumsum(0) - 1] for hidden in tokens]
            sums = self.token_heads.sums(tokens, lengths)
        else:
            ends = [scorer.ends(batch) for scorer in self.ensemble.members]
        raw = total = self.ensemble.of_ends(ends)
        if self.length_heads is not None:
            length_scores = self.length_heads.scores(ends)
            total = raw + length_scores
        better, worse = total[:, pairs.better], total[:, pairs.worse]
        each = RF.bradley_terry_loss(better, worse, margin)
        if self.center_rewards_coef:
            each = each + self.center_rewards_coef * (better + worse).square()
        if self.token_heads is not None and sums is not None:
            lead_of_sums = sums[:, pairs.better] - sums[:, pairs.worse]
            each = each + self.token_heads.losses(better - worse, lead_of_sums, margin)
        losses = torch.stack([pairs.mean(row) for row in each])
        if self.length_heads is not None:
            penalties = self.length_heads.penalties(raw, length_scores, lengths, self.ensemble.heads)
            losses = losses + penalties[:, None]
        self._record_scores(stage, batch, losses.detach(), raw.detach(), pairs)
        return losses

    def _record_scores(
        self, stage: str, batch: PackedBatch, losses: Tensor, raw: Tensor, pairs: RF.Comparisons
    ) -> None:
        scores = raw.mean(0)
        lead = scores[pairs.better] - scores[pairs.worse]
        values = {
            "loss": losses,
            "accuracy": pairs.mean(RF.pairwise_accuracy(lead, torch.zeros_like(lead))),
            "margin": pairs.mean(lead),
            "mean_reward": scores,
            "min_reward": scores.amin(),
            "max_reward": scores.amax(),
        }
        if self.num_members > 1:
            values["disagreement"] = raw.std(0, correction=0)
        self.record(stage, batch, values)
        if stage != "train":
            self._evaluate(stage, batch, scores, pairs)
        if stage == "val":
            for metric, row in zip(self.reference_scores, raw, strict=True):
                cast(MeanAndStd, metric).update(row)

    def _evaluate(self, stage: str, batch: PackedBatch, scores: Tensor, pairs: RF.Comparisons) -> None:
        lengths = completion_lengths(batch)
        differs = pairs.counts.bool()
        better, worse = pairs.better[differs], pairs.worse[differs]
        for name, values in {
            "calibration_error": (scores[better], scores[worse]),
            "length_correlation": (scores, lengths),
            "longer_wins": (lengths[better], lengths[worse]),
        }.items():
            cast(Metric, self.evaluation[metric_key(stage, name)]).update(*values)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The summed loss of a micro-batch; see :meth:`Algorithm.step_mean`."""
        losses = self.kept_losses(self.losses(batch, "train"), batch.row_ids)
        # Every member's gradient has the size that it would have alone.
        return self.step_mean(losses, batch) * self.num_members

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The normalised score of every completion, ``(N,)``; of an ensemble, the aggregated one."""
        scores: Tensor = self.ensemble(batch)
        return scores

    # --- after an evaluation --------------------------------------------------------------------------------------

    def on_validation_epoch_end(self) -> None:
        """Log what was measured, and in a fit set the scale by the scores of this epoch."""
        super().on_validation_epoch_end()
        self._log_evaluation("val")
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        for metric, head in zip(self.reference_scores, self.ensemble.heads, strict=True):
            metric = cast(MeanAndStd, metric)
            if fitting:
                found = metric.compute()
                head.normalize_by(found["mean"].item(), found["std"].item())
            metric.reset()

    def on_test_epoch_end(self) -> None:
        """Log what was measured."""
        super().on_test_epoch_end()
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        for name in EVALUATION:
            metric = cast(Metric, self.evaluation[metric_key(stage, name)])
            if not self.trainer.sanity_checking:
                found = metric.compute()
                value = found["accuracy"] if isinstance(found, dict) else found
                self.log(f"{stage}/{name}", value.float(), batch_size=1)
            metric.reset()

    def on_train_end(self) -> None:
        """Say so where the scale was never set."""
        if not all(head.is_normalized for head in self.ensemble.heads):
            rank_zero_warn(
                "the reward model's scores are not normalised: there was no validation epoch. Give the datamodule "
                "val data or val_fraction, or kl_coef and shaping will mean something else for every reward model"
            )


def _check_settings(center_rewards_coef: float, num_members: int, member_share: float) -> None:
    if center_rewards_coef < 0:
        raise ValueError(f"center_rewards_coef must be at least 0, got {center_rewards_coef}")
    if num_members < 1:
        raise ValueError(f"num_members must be at least 1, got {num_members}")
    if not 0.0 < member_share <= 1.0:
        raise ValueError(f"member_share must lie in (0, 1], got {member_share}")
    if num_members == 1 and member_share < 1.0:
        raise ValueError(f"member_share {member_share} with one member would leave data out: set it to 1.0")


def in_share(row: int, member: int, share: float, seed: int) -> bool:
    """Whether a row is in a member's share of the data: the same in every epoch, batch and process.

    Example:
        >>> sum(in_share(row, 0, 0.75, 0) for row in range(1000))
        747
    """
    digest = hashlib.blake2b(f"{seed}:{member}:{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def group_sizes(batch: PackedBatch) -> list[int]:
    """Completions of each prompt.

    Raises:
        ValueError: If a prompt has fewer than two: there is nothing to compare.
    """
    if "label" in batch.extras:
        raise ValueError(
            "a reward model compares completions of one prompt, and these are labelled one by one: use "
            "PreferenceDataModule"
        )
    for row, lengths in zip(batch.row_ids, batch.completion_lengths, strict=True):
        if len(lengths) < 2:
            raise ValueError(
                f"row {row}: a reward model compares completions of one prompt, and this one has {len(lengths)}: use "
                "PreferenceDataModule"
            )
    return [len(lengths) for lengths in batch.completion_lengths]


def completion_lengths(batch: PackedBatch) -> Tensor:
    """Tokens of every completion, ``(N,)``."""
    return torch.tensor([n for c in batch.completion_lengths for n in c], device=batch.input_ids.device)


def ranks(batch: PackedBatch) -> Tensor:
    """The rank of every completion, ``(N,)``, lower is better; without ranks the order of a group."""
    if batch.ranks is not None:
        return batch.ranks
    order = [float(place) for lengths in batch.completion_lengths for place in range(len(lengths))]
    return torch.tensor(order, device=batch.input_ids.device)
