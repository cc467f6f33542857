"""ODIN: a length head beside the quality head of a reward model takes what is only length."""

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_same_shape

__all__ = ["odin_length_loss", "odin_orthogonality"]


def odin_length_loss(quality: Tensor, length_scores: Tensor, lengths: Tensor) -> Tensor:
    r"""$|\rho(r_Q, |y|)| - \rho(r_L, |y|)$: length goes out of one head and into the other.

    Equation 5 of Chen et al. (2024), "ODIN: Disentangled Reward Mitigates Hacking in RLHF", with Pearson's ρ over the
    completions of a batch. The ranking loss is of $r_Q + r_L$, and a policy is trained on $r_Q$ alone.

    Args:
        quality: Scores that are kept, ``(N,)``.
        length_scores: Scores of the length head, ``(N,)``.
        lengths: Of the same completions, in tokens, ``(N,)``.

    Returns:
        A scalar in [−1, 2]; a correlation with what does not vary counts as 0.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> lengths = torch.tensor([1, 2, 3])
        >>> odin_length_loss(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([2.0, 4.0, 6.0]), lengths)
        tensor(-1.0000)
        >>> odin_length_loss(torch.tensor([3.0, 2.0, 1.0]), torch.zeros(3), lengths)
        tensor(1.0000)
    """
    require_same_shape("quality", quality, "length_scores", length_scores)
    require_same_shape("length_scores", length_scores, "lengths", lengths)
    return _correlation(quality, lengths).abs() - _correlation(length_scores, lengths)


def odin_orthogonality(quality_weight: Tensor, length_weight: Tensor) -> Tensor:
    r"""$|w_Q \cdot w_L| / (|w_Q| |w_L|)$, which is 0 where the heads look at different things.

    Equation 6 of Chen et al. (2024), "ODIN", on normalised weights: their size would else be lowered instead.

    Args:
        quality_weight: Of the head that is kept, any shape.
        length_weight: Of the length head, of the same shape.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> odin_orthogonality(torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 4.0]))
        tensor(0.6000)
    """
    require_same_shape("quality_weight", quality_weight, "length_weight", length_weight)
    return torch.cosine_similarity(quality_weight.flatten(), length_weight.flatten(), dim=0).abs()


def _correlation(values: Tensor, lengths: Tensor) -> Tensor:
    """Pearson's correlation with a gradient; 0 where either does not vary."""
    values, lengths = values - values.mean(), lengths.to(values.dtype)
    return torch.cosine_similarity(values, lengths - lengths.mean(), dim=0)
