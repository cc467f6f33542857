"""Whether a reward model is as sure of its preferences as it is right."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_finite
from lightning_rlhf.functional.preference import pairwise_accuracy

__all__ = [
    "ReliabilityCurve",
    "calibration_bins",
    "calibration_error",
    "curve_of_bins",
    "error_of_bins",
    "reliability_curve",
]


class ReliabilityCurve(NamedTuple):
    """Confidence against accuracy in equal bins of [0.5, 1].

    Attributes:
        confidence: Mean confidence in each bin, ``(num_bins,)``; nan where a bin is empty.
        accuracy: Share of the bin's pairs that were ordered as labelled, ``(num_bins,)``; nan where it is empty.
        counts: Pairs in each bin, ``(num_bins,)``.
    """

    confidence: Tensor
    accuracy: Tensor
    counts: Tensor


def calibration_bins(margins: Tensor, *, num_bins: int) -> Tensor:
    r"""The sums that the curve and the error are made of; those of two batches add up.

    A pair of margin m is held with the folded confidence $\max(\sigma(m), 1 - \sigma(m)) = \sigma(|m|)$ and is right
    where m > 0; a tie is half right.

    Args:
        margins: Score of the chosen minus score of the rejected completion, any shape.
        num_bins: Bins of equal width on [0.5, 1]; each holds its lower edge, the last both.

    Returns:
        Counts, sums of confidence and sums of right answers, ``(3, num_bins)``, float64. A margin that is not
        finite makes the sums nan: telling so at once would wait for the device.

    Example:
        >>> calibration_bins(torch.tensor([0.0, 9.0]), num_bins=2)
        tensor([[1.0000, 1.0000],
                [0.5000, 0.9999],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    margins = margins.detach().reshape(-1).double()
    confidence = torch.sigmoid(margins.abs())
    index = ((confidence - 0.5) * 2 * num_bins).nan_to_num().long().clamp(0, num_bins - 1)
    right = pairwise_accuracy(margins, torch.zeros_like(margins)).double()
    right = right.masked_fill(~margins.isfinite(), torch.nan)
    # A product with one-hot columns: exact and, unlike a scatter on a GPU, always in the same order.
    one_hot = (index[:, None] == torch.arange(num_bins, device=index.device)).double()
    return torch.stack([torch.ones_like(confidence), confidence, right]) @ one_hot


def curve_of_bins(bins: Tensor) -> ReliabilityCurve:
    """The reliability curve of sums over bins.

    Args:
        bins: What :func:`calibration_bins` returns, ``(3, num_bins)``.

    Returns:
        The curve, float64.

    Example:
        >>> curve_of_bins(torch.tensor([[2.0], [1.8], [1.0]]).double()).accuracy
        tensor([0.5000], dtype=torch.float64)
    """
    counts, confidence, right = bins
    return ReliabilityCurve(confidence / counts, right / counts, counts)


def error_of_bins(bins: Tensor) -> Tensor:
    """The expected calibration error of sums over bins.

    Args:
        bins: What :func:`calibration_bins` returns, ``(3, num_bins)``.

    Returns:
        The error, a scalar, float64; nan where nothing was seen.

    Example:
        >>> error_of_bins(torch.tensor([[2.0], [1.8], [1.0]]).double())
        tensor(0.4000, dtype=torch.float64)
    """
    counts, confidence, right = bins
    return (right - confidence).abs().sum() / counts.sum()


def reliability_curve(margins: Tensor, *, num_bins: int = 10) -> ReliabilityCurve:
    r"""How often a preference held with some confidence is the labelled one.

    The confidence of a pair is $\max(p, 1 - p)$ with $p = \sigma(r(y_w) - r(y_l))$, the Bradley–Terry probability of
    its label; the curve of a calibrated model is the diagonal. Figure 1 of Guo et al. (2017), "On Calibration of
    Modern Neural Networks", folded onto [0.5, 1] since which of two completions comes first means nothing.

    Args:
        margins: Score of the chosen minus score of the rejected completion, any shape.
        num_bins: Bins of equal width on [0.5, 1].

    Returns:
        Mean confidence, accuracy and count of each bin, float64.

    Raises:
        ValueError: If a margin is not finite, or ``num_bins`` below 1.

    Example:
        >>> curve = reliability_curve(torch.tensor([0.0, 9.0, -9.0]), num_bins=2)
        >>> curve.accuracy
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> curve.counts
        tensor([1., 2.], dtype=torch.float64)
    """
    return curve_of_bins(_checked_bins(margins, num_bins))


def calibration_error(margins: Tensor, *, num_bins: int = 10) -> Tensor:
    r"""Expected calibration error of σ(margin): how far confidence and accuracy lie apart, on average over pairs.

    $\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|$ over bins of the folded confidence: equation 3 of Guo et
    al. (2017), "On Calibration of Modern Neural Networks". Each bin's noise counts as an error, so the value is
    above 0 even for a perfect model: about 0.04 on 500 pairs. Use at least 3,000.

    Args:
        margins: Score of the chosen minus score of the rejected completion, any shape.
        num_bins: Bins of equal width on [0.5, 1].

    Returns:
        The error, a scalar in [0, 1], float64; nan without margins.

    Raises:
        ValueError: If a margin is not finite, or ``num_bins`` below 1.

    Example:
        Sure of all and right in three of four: 1 − 0.75.

        >>> calibration_error(torch.tensor([50.0, 50.0, 50.0, -50.0]))
        tensor(0.2500, dtype=torch.float64)
    """
    return error_of_bins(_checked_bins(margins, num_bins))


def _checked_bins(margins: Tensor, num_bins: int) -> Tensor:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    require_finite("margins", margins)
    return calibration_bins(margins, num_bins=num_bins)
