"""Correlation of two quantities over everything seen."""

import torch
from torch import Tensor

from lightning_rlhf.metrics.aggregation import _Float64States


class Correlation(_Float64States):
    r"""Pearson's correlation $\frac{E[xy] - E[x] E[y]}{\sqrt{Var[x] \, Var[y]}}$ since the last reset.

    Means, squared deviations and their product are accumulated in float64 and merged exactly, so that it does not
    matter how the values are cut into batches and processes.

    Example:
        >>> metric = Correlation()
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]))
        >>> metric.update(torch.tensor([3.0]), torch.tensor([7.0]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    full_state_update = False
    moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        # count, mean x, mean y, Σ(x − x̄)², Σ(y − ȳ)², Σ(x − x̄)(y − ȳ); stacked over processes
        self.add_state("moments", torch.zeros(6, dtype=torch.float64), dist_reduce_fx=None)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add pairs of values; any shape, the same for both."""
        x, y = x.detach().double().flatten(), y.detach().double().flatten()
        if not len(x):
            return
        dx, dy = x - x.mean(), y - y.mean()
        values = [torch.full_like(x[0], len(x)), x.mean(), y.mean(), dx @ dx, dy @ dy, dx @ dy]
        self.moments = merge_moments(torch.stack([self.moments, torch.stack(values)]))

    def compute(self) -> Tensor:
        """The correlation, in [−1, 1]; nan where one of the two did not vary."""
        _, _, _, xx, yy, xy = merge_moments(self.moments.reshape(-1, 6))
        return (xy / (xx * yy).sqrt()).clamp(-1.0, 1.0)


def merge_moments(rows: Tensor) -> Tensor:
    """Moments of the union of several sets of values (Chan et al., 1979).

    Args:
        rows: One set a row, ``(K, 6)``: count, both means, both sums of squared deviations, that of their products.

    Returns:
        The same six numbers of the union, ``(6,)``.

    Example:
        >>> one, three = [1.0, 1.0, 2.0, 0.0, 0.0, 0.0], [1.0, 3.0, 4.0, 0.0, 0.0, 0.0]
        >>> merge_moments(torch.tensor([one, three]))
        tensor([2., 2., 3., 2., 2., 2.])
    """
    counts = rows[:, 0]
    total = counts.sum()
    mean = (counts[:, None] * rows[:, 1:3]).sum(0) / total.clamp(min=1)
    dx, dy = (rows[:, 1:3] - mean).T
    between = torch.stack([counts * dx * dx, counts * dy * dy, counts * dx * dy], dim=1)
    return torch.cat([total[None], mean, (rows[:, 3:] + between).sum(0)])
