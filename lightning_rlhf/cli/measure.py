"""What the quickstart measures on samples of a policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from lightning_rlhf.functional import kl_k1, kl_k3, sum_by_sequence
from lightning_rlhf.generation import Completion
from lightning_rlhf.models import LanguageModel

CHUNK = 64


@dataclass(frozen=True)
class Divergence:
    """KL(policy‖reference) of whole completions on the policy's own samples, in nats.

    Attributes:
        kl: The vocabulary summed out at every sampled position, summed over tokens, mean over samples.
        error: Its standard error over samples.
        k1: The plain estimate, log π − log π_ref of the sampled tokens.
        k3: The estimate that is never negative.
    """

    kl: float
    error: float
    k1: float
    k3: float


@torch.no_grad()
def divergence(
    policy: LanguageModel, reference: LanguageModel, completions: Sequence[Completion]
) -> Divergence:
    """Measure how far a policy is from a reference.

    Args:
        policy: What the completions were sampled from, at temperature 1 and without truncation.
        reference: With the same vocabulary.
        completions: The samples.

    Returns:
        Sums over tokens, means over samples.
    """
    sums: list[Tensor] = []
    for start in range(0, len(completions), CHUNK):
        chunk = completions[start : start + CHUNK]
        batch = pack(PromptGroup(c.prompt, [c.tokens]) for c in chunk)
        log_p, log_q = log_probabilities(policy, batch), log_probabilities(reference, batch)
        targets = batch.targets[:, None]
        sampled, ref_sampled = log_p.gather(1, targets)[:, 0], log_q.gather(1, targets)[:, 0]
        exact = (log_p.exp() * (log_p - log_q)).sum(-1)
        tokens = torch.stack([exact, kl_k1(sampled, ref_sampled), kl_k3(sampled, ref_sampled)])
        sums.append(torch.stack([sum_by_sequence(row, batch.target_lengths) for row in tokens]))
    kl, k1, k3 = torch.cat(sums, dim=1).double()
    return Divergence(kl.mean().item(), standard_error(kl.tolist()), k1.mean().item(), k3.mean().item())


def log_probabilities(model: LanguageModel, batch: PackedBatch) -> Tensor:
    """Log-probabilities of the whole vocabulary at every target, ``(M, V)``: for a vocabulary of a few hundred."""
    return model.logits(model.hidden_states(batch)).float().log_softmax(-1)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean.

    Example:
        >>> standard_error([1.0, 3.0])
        1.0
    """
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def win_rate(scores: Sequence[float], baseline: Sequence[float]) -> float:
    """Share of prompts on which a score is higher than the baseline's, ties counted as half.

    Example:
        >>> win_rate([1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 1.0, 4.0])
        0.625
    """
    points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(scores, baseline, strict=True)]
    return sum(points) / len(points)
