"""torchmetrics classes over :mod:`lightning_rlhf.functional`."""

from lightning_rlhf.metrics.aggregation import Mean, Total
from lightning_rlhf.metrics.correlation import Correlation

__all__ = ["Correlation", "Mean", "Total"]
