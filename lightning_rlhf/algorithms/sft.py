"""Supervised fine-tuning."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms.base import Algorithm, plain
from lightning_rlhf.algorithms.optimization import Optimization
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models import Policy


class SFT(Algorithm):
    r"""Supervised fine-tuning on demonstrations: minimise $-\frac{1}{n} \sum_t \log \pi(y_t \mid x, y_{<t})$.

    The mean is over the tokens that count of a whole optimizer step, over all micro-batches and ranks.

    Logs ``loss``, ``perplexity``, ``mean_token_accuracy``, ``entropy`` and ``num_tokens`` under ``train/``, ``val/``
    and ``test/``. ``predict`` returns the log-probability of every completion.

    Args:
        policy: A path or Hub id, :class:`Policy` settings, or a built Transformers or PEFT model.
        tokenizer: Needed with a built model; else the policy's own.
        optimization: Optimizer and schedule.

    Example:
        >>> SFT("no/such-model")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: no tokenizer at 'no/such-model': ...
    """

    metric_names = ("loss", "mean_token_accuracy", "entropy")

    def __init__(
        self,
        policy: Policy | str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        optimization: Optimization | None = None,
    ) -> None:
        super().__init__(policy, tokenizer, optimization)
        self.save_hyperparameters({"policy": plain(policy), "optimization": plain(self.optimization)})

    def losses(self, batch: PackedBatch, stage: str) -> Tensor:
        """Cross-entropy of every token that counts, ``(M,)``."""
        check_demonstrations(batch)
        tokens = self.policy(batch, with_entropy=True)
        losses = RF.sft_loss(tokens.logprobs)
        values = {"loss": losses, "mean_token_accuracy": tokens.correct.float(), "entropy": tokens.entropy}
        self.record(stage, batch, values)
        return losses

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The summed loss of a micro-batch; see :meth:`Algorithm.step_mean`."""
        return self.step_mean(self.losses(batch, "train"), batch)

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Log-probability of every completion, ``(N,)``, in nats."""
        return RF.sum_by_sequence(self.policy(batch).logprobs, batch.target_lengths)

    def derived_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """The perplexity, from the mean loss."""
        return {"perplexity": torch.exp(means["loss"])} if "loss" in means else {}


def check_demonstrations(batch: PackedBatch) -> None:
    """Refuse a batch with more than a demonstration a prompt: rejected answers would be learned as well.

    Raises:
        ValueError: If a prompt has another number of completions than one.
    """
    for row, lengths in zip(batch.row_ids, batch.completion_lengths, strict=True):
        if len(lengths) != 1:
            raise ValueError(
                f"row {row}: SFT needs one completion a prompt, the demonstration, got {len(lengths)}: use "
                "SFTDataModule"
            )
