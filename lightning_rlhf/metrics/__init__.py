"""torchmetrics classes over :mod:`lightning_rlhf.functional`."""

from lightning_rlhf.metrics.accuracy import PairwiseAccuracy
from lightning_rlhf.metrics.aggregation import Mean, Total
from lightning_rlhf.metrics.agreement import AnnotatorAgreement
from lightning_rlhf.metrics.calibration import CalibrationError
from lightning_rlhf.metrics.goodhart import GoodhartCurve, GoodhartGap
from lightning_rlhf.metrics.length import LengthCorrelation, LongerWins
from lightning_rlhf.metrics.margins import Margins, MeanAndStd

__all__ = [
    "AnnotatorAgreement",
    "CalibrationError",
    "GoodhartCurve",
    "GoodhartGap",
    "LengthCorrelation",
    "LongerWins",
    "Margins",
    "Mean",
    "MeanAndStd",
    "PairwiseAccuracy",
    "Total",
]
