"""Whether a reward, or a label, is only length."""

from torch import Tensor

from lightning_rlhf.functional.checks import require_finite, require_same_shape
from lightning_rlhf.functional.moments import correlation_of_moments, moments
from lightning_rlhf.functional.preference import pairwise_accuracy

__all__ = ["length_correlation", "longer_wins_accuracy"]


def length_correlation(rewards: Tensor, lengths: Tensor) -> Tensor:
    r"""Pearson's correlation of rewards with lengths.

    $\sum_i (r_i - \bar r)(l_i - \bar l) / \sqrt{\sum_i (r_i - \bar r)^2 \sum_i (l_i - \bar l)^2}$. Singhal et al.
    (2023), "A Long Way to Go", find that much of what reward models learn is length.

    Args:
        rewards: One per completion, ``(N,)``.
        lengths: Of the same completions, in tokens, ``(N,)``.

    Returns:
        A scalar in [-1, 1], float64; nan where either does not vary, or below two completions.

    Raises:
        ValueError: If shapes differ or a value is not finite.

    Example:
        >>> import torch
        >>> length_correlation(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([10, 20, 30]))
        tensor(1.0000, dtype=torch.float64)
    """
    require_same_shape("rewards", rewards, "lengths", lengths)
    require_finite("rewards", rewards)
    require_finite("lengths", lengths)
    return correlation_of_moments(moments(rewards, lengths))


def longer_wins_accuracy(chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
    """Whether "the longer wins" gives a pair's label: 1, 0, or one half for equal lengths.

    A reward model that is not better than this on average may have learnt nothing but length.

    Args:
        chosen_lengths: Of the preferred completions, in tokens, ``(N,)``.
        rejected_lengths: Of the other completions, ``(N,)``.

    Returns:
        One value per pair, ``(N,)``, float32.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> import torch
        >>> longer_wins_accuracy(torch.tensor([9, 3, 5]), torch.tensor([4, 8, 5]))
        tensor([1.0000, 0.0000, 0.5000])
    """
    require_same_shape("chosen_lengths", chosen_lengths, "rejected_lengths", rejected_lengths)
    return pairwise_accuracy(chosen_lengths, rejected_lengths)
