"""torchmetrics classes over :mod:`lightning_rlhf.functional`."""

from lightning_rlhf.metrics.aggregation import Mean, Total

__all__ = ["Mean", "Total"]
