"""What a metric refuses when it is read."""

from torch import Tensor
from torchmetrics import Metric

__all__ = ["require_finite_states"]


def require_finite_states(metric: Metric, names: str, states: Tensor) -> None:
    """Refuse sums that a nan or an infinity went into.

    Args:
        metric: Whose sums they are.
        names: The arguments of its ``update``, for the message.
        states: The sums, any shape.

    Raises:
        ValueError: If one is not finite.

    Example:
        >>> import torch
        >>> from lightning_rlhf.metrics import Mean
        >>> require_finite_states(Mean(), "values", torch.zeros(2))
    """
    if not states.isfinite().all():
        raise ValueError(
            f"{type(metric).__name__} was given {names} that is nan or infinite since its last reset: find out where "
            "the model's output overflows, or leave such rows out before update()"
        )
