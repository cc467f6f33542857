"""Between tokens laid end to end and one padded row per sequence."""

import torch
from torch import Tensor


def pad_by_sequence(flat: Tensor, lengths: Tensor, *, width: int | None = None) -> tuple[Tensor, Tensor]:
    """One row per sequence, padded on the right with 0.

    Args:
        flat: Values of the tokens of all sequences, one after the other, ``(M,)``.
        lengths: Tokens a sequence, ``(N,)``, integer, with sum M.
        width: T, at least the longest length; by default that, which is read from the device.

    Returns:
        The rows ``(N, T)``, through which gradients flow, and their mask ``(N, T)``, True where a token stands.

    Raises:
        ValueError: If ``flat`` or ``lengths`` is not one-dimensional.

    Example:
        >>> padded, mask = pad_by_sequence(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 1]))
        >>> padded.tolist(), mask.tolist()
        ([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]], [[True, True], [False, False], [True, False]])
    """
    if flat.ndim != 1 or lengths.ndim != 1:
        raise ValueError(
            f"flat must be (M,) and lengths (N,), got {tuple(flat.shape)} and {tuple(lengths.shape)}"
        )
    if width is None:
        width = int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(width, device=flat.device) < lengths[:, None]
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat), mask


def unpad(padded: Tensor, mask: Tensor) -> Tensor:
    """The values that count, row after row: what :func:`pad_by_sequence` was given.

    Args:
        padded: ``(N, T)``.
        mask: ``(N, T)``, boolean, True where a value counts.

    Returns:
        ``(M,)``, M the number of values that count. Waits for the device, which alone knows M.

    Example:
        >>> unpad(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
        tensor([1., 2., 3.])
    """
    return padded[mask]
