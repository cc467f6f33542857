"""How often a model orders pairs as they are labelled, and how sure that number is."""

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_same_shape
from lightning_rlhf.functional.intervals import wilson_interval
from lightning_rlhf.functional.preference import pairwise_accuracy
from lightning_rlhf.metrics.aggregation import _Float64States
from lightning_rlhf.metrics.checks import require_finite_states

__all__ = ["PairwiseAccuracy", "accuracy_with_interval", "number_of_wins"]


class PairwiseAccuracy(_Float64States):
    """Share of pairs whose chosen completion scores higher, with Wilson's interval; a tie counts one half.

    Log it by ``self.log_dict(metric.compute())``: three scalars. The twins in the functional layer are
    :func:`lightning_rlhf.functional.pairwise_accuracy`, per pair, and
    :func:`lightning_rlhf.functional.wilson_interval`.

    Args:
        confidence: Share of such intervals that hold the true accuracy, in (0, 1). Pairs are taken as independent:
            where many share a prompt, the interval is too narrow.

    Raises:
        ValueError: If ``confidence`` is out of range.

    Example:
        >>> metric = PairwiseAccuracy()
        >>> metric.update(torch.tensor([1.0, 2.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'accuracy': 0.625, 'lower': 0.219, 'upper': 0.908}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    correct: Tensor
    pairs: Tensor

    def __init__(self, *, confidence: float = 0.95) -> None:
        super().__init__()
        wilson_interval(0, 0, confidence=confidence)  # checks the range before anything was counted
        self.confidence = confidence
        self.add_state("correct", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add pairs.

        Args:
            chosen: Scores of the preferred completions, ``(N,)``.
            rejected: Those of the other completions, ``(N,)``.

        Raises:
            ValueError: If the shapes differ.
        """
        require_same_shape("chosen", chosen, "rejected", rejected)
        self.correct = self.correct + number_of_wins(chosen, rejected)
        self.pairs = self.pairs + chosen.numel()

    def compute(self) -> dict[str, Tensor]:
        """``accuracy``, and ``lower`` and ``upper`` end of its interval; nan, 0 and 1 where nothing was seen.

        Raises:
            ValueError: If a score since the last reset was not finite.
        """
        require_finite_states(self, "chosen or rejected", self.correct)
        return accuracy_with_interval(self.correct, self.pairs, confidence=self.confidence)


def number_of_wins(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How many pairs the chosen completion wins, ties counting one half.

    Args:
        chosen: Scores or lengths of the preferred completions, ``(N,)``.
        rejected: Those of the other completions, ``(N,)``.

    Returns:
        A scalar, float64; nan if a value is not finite, for the metric to tell when it is read: asking here would
        wait for the device.

    Example:
        >>> number_of_wins(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))
        tensor(1.5000, dtype=torch.float64)
    """
    wins = pairwise_accuracy(chosen.detach(), rejected.detach())
    finite = torch.isfinite(chosen) & torch.isfinite(rejected)
    return wins.masked_fill(~finite, torch.nan).sum(dtype=torch.float64)


def accuracy_with_interval(correct: Tensor, pairs: Tensor, *, confidence: float) -> dict[str, Tensor]:
    """A share and Wilson's interval, as scalars to log.

    Args:
        correct: How many pairs count as right.
        pairs: Out of how many.
        confidence: Of the interval, in (0, 1).

    Returns:
        ``accuracy``, ``lower`` and ``upper``.

    Example:
        >>> accuracy_with_interval(torch.tensor(1.0), torch.tensor(2.0), confidence=0.95)["accuracy"]
        tensor(0.5000)
    """
    lower, upper = wilson_interval(correct, pairs, confidence=confidence)
    return {"accuracy": correct / pairs, "lower": lower, "upper": upper}
