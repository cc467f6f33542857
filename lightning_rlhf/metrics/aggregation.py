"""Means and sums that stay exact under any precision and any number of processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class _Float64States(Metric):
    """A metric whose states stay float64 when a precision plugin casts its module.

    ``bf16-true`` would otherwise cast them: in bfloat16, 1,000 updates by 1 count 256.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> "_Float64States":  # noqa: ANN401
        before = {name: getattr(self, name) for name in self._defaults}
        super()._apply(fn, *args)
        for name, value in before.items():
            now = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, [old.to(new.device) for old, new in zip(value, now, strict=True)])
            else:
                setattr(self, name, value.to(now.device))
            default = self._defaults[name]
            self._defaults[name] = default.double() if isinstance(default, Tensor) else default
        self._computed = None  # a cached result was cast as well
        return self


class Mean(_Float64States):
    """Mean of everything seen since the last reset, each value with the same weight.

    Example:
        >>> metric = Mean()
        >>> metric.update(torch.tensor([1.0, 2.0]))
        >>> metric.update(torch.tensor([6.0]))
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values, one each; any shape."""
        # New tensors, not in place: a state made in inference mode may not be changed outside of it.
        self.total = self.total + values.detach().sum(dtype=torch.float64)
        self.count = self.count + values.numel()

    def compute(self) -> Tensor:
        """The mean; nan where nothing was seen."""
        return self.total / self.count


class Total(_Float64States):
    """Sum of everything seen; kept in checkpoints.

    Example:
        >>> metric = Total()
        >>> metric.update(3)
        >>> metric.update(4)
        >>> metric.compute()
        tensor(7., dtype=torch.float64)
    """

    full_state_update = False
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    def update(self, value: float) -> None:
        """Add a number that the host knows."""
        self.total = self.total + value

    def compute(self) -> Tensor:
        """The sum over all processes."""
        return self.total
