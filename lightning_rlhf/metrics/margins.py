"""Mean and spread: of any values, and of how far apart a model puts the two completions of a pair."""

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_same_shape
from lightning_rlhf.functional.moments import mean_and_std_of_moments, merge_moments, moments
from lightning_rlhf.metrics.aggregation import _Float64States
from lightning_rlhf.metrics.checks import require_finite_states

__all__ = ["Margins", "MeanAndStd"]


class MeanAndStd(_Float64States):
    """Mean and standard deviation; twin of :func:`lightning_rlhf.functional.mean_and_std`.

    Example:
        >>> metric = MeanAndStd()
        >>> metric.update(torch.tensor([1.0]))
        >>> metric.update(torch.tensor([3.0]))
        >>> metric.compute()
        {'mean': tensor(2., dtype=torch.float64), 'std': tensor(1.4142, dtype=torch.float64)}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    value_moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value_moments", torch.zeros(3, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, values: Tensor) -> None:
        """Add values; any shape."""
        self.value_moments = merge_moments(torch.stack([self.value_moments, moments(values)]))

    def compute(self) -> dict[str, Tensor]:
        """``mean``, nan where nothing was seen, and ``std`` (n − 1 in its denominator), nan below two values.

        Raises:
            ValueError: If a value since the last reset was not finite.
        """
        require_finite_states(self, "values", self.value_moments)
        mean, std = mean_and_std_of_moments(self.value_moments)
        return {"mean": mean[0], "std": std[0]}


class Margins(_Float64States):
    """Mean and standard deviation of chosen minus rejected; twin of :func:`lightning_rlhf.functional.mean_and_std`.

    No quantiles: margins have no bounds, so they cannot be had exactly without storing every one.

    Example:
        >>> metric = Margins()
        >>> metric.update(torch.tensor([1.0]), torch.tensor([0.0]))
        >>> metric.update(torch.tensor([3.0]), torch.tensor([0.0]))
        >>> metric.compute()
        {'mean': tensor(2., dtype=torch.float64), 'std': tensor(1.4142, dtype=torch.float64)}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    margin_moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("margin_moments", torch.zeros(3, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add pairs.

        Args:
            chosen: Scores of the preferred completions, ``(N,)``.
            rejected: Those of the other completions, ``(N,)``.

        Raises:
            ValueError: If the shapes differ.
        """
        require_same_shape("chosen", chosen, "rejected", rejected)
        margins = chosen.double() - rejected.double()
        self.margin_moments = merge_moments(torch.stack([self.margin_moments, moments(margins)]))

    def compute(self) -> dict[str, Tensor]:
        """``mean``, nan where nothing was seen, and ``std`` (n − 1 in its denominator), nan below two pairs.

        Raises:
            ValueError: If a score since the last reset was not finite.
        """
        require_finite_states(self, "chosen or rejected", self.margin_moments)
        mean, std = mean_and_std_of_moments(self.margin_moments)
        return {"mean": mean[0], "std": std[0]}
