"""How much of a reward, and how much of the labels, is length."""

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_same_shape
from lightning_rlhf.functional.intervals import wilson_interval
from lightning_rlhf.functional.moments import correlation_of_moments, merge_moments, moments
from lightning_rlhf.metrics.accuracy import accuracy_with_interval, number_of_wins
from lightning_rlhf.metrics.aggregation import _Float64States
from lightning_rlhf.metrics.checks import require_finite_states

__all__ = ["LengthCorrelation", "LongerWins"]


class LengthCorrelation(_Float64States):
    """Pearson's correlation of rewards with lengths; twin of :func:`lightning_rlhf.functional.length_correlation`.

    Batches and processes are merged by Chan's formula, so that no rewards are stored and nothing cancels.

    Example:
        >>> metric = LengthCorrelation()
        >>> metric.update(torch.tensor([0.0, 1.0]), torch.tensor([10, 20]))
        >>> metric.update(torch.tensor([0.0]), torch.tensor([30]))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    length_moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("length_moments", torch.zeros(7, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, rewards: Tensor, lengths: Tensor) -> None:
        """Add completions.

        Args:
            rewards: One per completion, ``(N,)``.
            lengths: Of the same completions, in tokens, ``(N,)``.

        Raises:
            ValueError: If the shapes differ.
        """
        require_same_shape("rewards", rewards, "lengths", lengths)
        self.length_moments = merge_moments(torch.stack([self.length_moments, moments(rewards, lengths)]))

    def compute(self) -> Tensor:
        """The correlation; nan where rewards or lengths do not vary, or below two completions.

        Raises:
            ValueError: If a reward since the last reset was not finite.
        """
        require_finite_states(self, "rewards or lengths", self.length_moments)
        return correlation_of_moments(self.length_moments)


class LongerWins(_Float64States):
    """How often the longer completion is the chosen one, with Wilson's interval; equal lengths count one half.

    What a judge reaches that looks at nothing but length: read an accuracy against it. Twin of
    :func:`lightning_rlhf.functional.longer_wins_accuracy`, which is per pair.

    Args:
        confidence: Share of such intervals that hold the true value, in (0, 1).

    Raises:
        ValueError: If ``confidence`` is out of range.

    Example:
        >>> metric = LongerWins()
        >>> metric.update(torch.tensor([9, 7, 3, 5]), torch.tensor([4, 2, 8, 5]))
        >>> metric.compute()["accuracy"]
        tensor(0.6250, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    # Names of its own: a MetricCollection takes metrics whose states are called the same and happen to be equal
    # after one batch for one metric.
    longer_won: Tensor
    compared: Tensor

    def __init__(self, *, confidence: float = 0.95) -> None:
        super().__init__()
        wilson_interval(0, 0, confidence=confidence)
        self.confidence = confidence
        self.add_state("longer_won", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("compared", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen_lengths: Tensor, rejected_lengths: Tensor) -> None:
        """Add pairs.

        Args:
            chosen_lengths: Of the preferred completions, in tokens, ``(N,)``.
            rejected_lengths: Of the other completions, ``(N,)``.

        Raises:
            ValueError: If the shapes differ.
        """
        require_same_shape("chosen_lengths", chosen_lengths, "rejected_lengths", rejected_lengths)
        self.longer_won = self.longer_won + number_of_wins(chosen_lengths, rejected_lengths)
        self.compared = self.compared + chosen_lengths.numel()

    def compute(self) -> dict[str, Tensor]:
        """``accuracy`` of "the longer wins", and ``lower`` and ``upper`` end of its interval.

        Raises:
            ValueError: If a length since the last reset was not finite.
        """
        require_finite_states(self, "chosen_lengths or rejected_lengths", self.longer_won)
        return accuracy_with_interval(self.longer_won, self.compared, confidence=self.confidence)
