"""What the statistics refuse: shapes that would broadcast, values that are no numbers."""

import torch
from torch import Tensor

__all__ = ["require_finite", "require_same_shape"]


def require_same_shape(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Refuse two tensors of different shapes: (N,) against (N, 1) would silently compare all with all.

    Args:
        first: Name of ``a`` in the message.
        a: Any tensor.
        second: Name of ``b`` in the message.
        b: The tensor that has to match.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> require_same_shape("chosen", torch.zeros(2), "rejected", torch.zeros(2))
    """
    if a.shape != b.shape:
        raise ValueError(
            f"{first} has shape {tuple(a.shape)} and {second} {tuple(b.shape)}: give both the same shape, "
            "one value per row"
        )


def require_finite(name: str, values: Tensor) -> None:
    """Refuse nan and infinity. Reads the values: one synchronisation with the device.

    Args:
        name: Name of the values in the message.
        values: Any shape; "row" in the message counts them in order.

    Raises:
        ValueError: If a value is nan or infinite.

    Example:
        >>> require_finite("margins", torch.tensor([0.5, -1.0]))
    """
    bad = ~torch.isfinite(values.reshape(-1))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{name} is {values.reshape(-1)[row].item()} in row {row} ({int(bad.sum())} of {bad.numel()} values are "
            "not finite): find out where the model's output overflows, or drop those rows yourself"
        )
