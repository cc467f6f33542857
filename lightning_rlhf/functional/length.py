"""Whether a reward, or a label, is only length."""

from torch import Tensor

from lightning_rlhf.functional.checks import require_finite, require_same_shape
from lightning_rlhf.functional.moments import correlation_of_moments, moments
from lightning_rlhf.functional.preference import pairwise_accuracy

__all__ = ["length_correlation", "longer_wins_accuracy", "soft_overlong_penalty"]


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


def soft_overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    r"""DAPO's penalty of overlong completions, which begins before the limit.

    0 for $|y| \le L - B$, then $\frac{(L - B) - |y|}{B}$ down to −1 at L, and −1 beyond: equation 13 of Yu et al.
    (2025), "DAPO: An Open-Source LLM Reinforcement Learning System at Scale".

    Args:
        lengths: Of completions, in tokens, ``(N,)``.
        max_length: L, in tokens.
        buffer: B, the tokens before L on which the penalty grows; 0 for a step at L.

    Returns:
        One penalty per completion in [−1, 0], ``(N,)``, float32, to be added to its reward.

    Raises:
        ValueError: If ``buffer`` does not lie between 0 and ``max_length``.

    Example:
        >>> import torch
        >>> soft_overlong_penalty(torch.tensor([80, 90, 100, 101]), max_length=100, buffer=20)
        tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"buffer must lie between 0 and max_length ({max_length}), got {buffer}")
    beyond = (lengths - (max_length - buffer)).clamp(min=0).float()
    return 0.0 - ((beyond / buffer).clamp(max=1.0) if buffer else (beyond > 0).float())
