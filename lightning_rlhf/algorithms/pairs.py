"""What algorithms on pairs of a chosen and a rejected completion measure, whatever samples or labels them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.functional import TokenLogprobs
from lightning_rlhf.objectives import Completions, Objective, Pairs

PAIR = 2
LENGTH_CORRELATION = "rewards/length_correlation"


def pair_metric_names(objective: Objective) -> tuple[str, ...]:
    """The names of :func:`pair_metrics`."""
    return (*objective.metric_names, LENGTH_CORRELATION, "mean_token_accuracy", "entropy")


@torch.no_grad()
def pair_metrics(
    objective: Objective,
    losses: Tensor,
    completions: Completions,
    pairs: Pairs,
    tokens: TokenLogprobs,
    batch: PackedBatch,
) -> Mapping[str, Tensor | tuple[Tensor, ...]]:
    """Values for the running metrics of a stage.

    Args:
        objective: What is minimised.
        losses: One a pair, ``(N/2,)``.
        completions: All completions, N.
        pairs: The same as pairs.
        tokens: What the policy said of every token, entropy included.
        batch: Where they come from.

    Returns:
        By name, values to add; several where the metric takes several.
    """
    assert tokens.entropy is not None
    return {
        "loss": losses,
        **objective.metrics(pairs),
        LENGTH_CORRELATION: (objective.rewards(completions), batch.target_lengths),
        "mean_token_accuracy": torch.cat(tokens.correct.split(batch.num_targets)[0::PAIR]).float(),
        "entropy": tokens.entropy,
    }
