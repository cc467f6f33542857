"""Eval mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["in_eval_mode"]


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every part is in the mode that it was in: ``train()`` would also switch on what was off.

    Example:
        >>> dropout, frozen = nn.Dropout(), nn.Dropout().eval()
        >>> both = nn.ModuleList([dropout, frozen])
        >>> with in_eval_mode(both):
        ...     dropout.training
        False
        >>> dropout.training, frozen.training
        (True, False)
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
