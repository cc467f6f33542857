"""Shares and means of the policy's samples beside those of a control."""

from statistics import NormalDist

import torch
from torch import Tensor

from lightning_rlhf.functional.intervals import newcombe_interval, wilson_interval
from lightning_rlhf.functional.moments import mean_and_std_of_moments, merge_moments, moments
from lightning_rlhf.metrics.aggregation import _Float64States
from lightning_rlhf.metrics.checks import require_finite_states

__all__ = ["MeanChange", "ShareChange"]


class ShareChange(_Float64States):
    """Base of detectors that count: how often samples have some property, and the change against the control.

    Args:
        names: Of the properties.
        confidence: Of the intervals, in (0, 1).

    Raises:
        ValueError: If ``confidence`` is out of range.

    Example:
        >>> metric = ShareChange(("shouts",))
        >>> metric.update(torch.tensor([[True], [True], [False], [True]]))
        >>> metric.update(torch.tensor([[False], [False]]), reference=True)
        >>> found = metric.compute()
        >>> found["shouts"], found["shouts_reference"], found["shouts_change"]
        (tensor(0.7500, dtype=torch.float64), tensor(0., dtype=torch.float64), tensor(0.7500, dtype=torch.float64))
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    counts: Tensor

    def __init__(self, names: tuple[str, ...], *, confidence: float = 0.95) -> None:
        super().__init__()
        wilson_interval(0, 0, confidence=confidence)
        self.names = names
        self.confidence = confidence
        # Rows: the policy, the control. Columns: how many have each property, and how many there are.
        zeros = torch.zeros(2, len(names) + 1, dtype=torch.float64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, flags: Tensor, *, reference: bool = False) -> None:
        """Count samples: whether each has each property, ``(N, len(names))``; of the control where asked."""
        found = torch.cat([flags.sum(0).double(), flags.new_full((1,), len(flags), dtype=torch.float64)])
        counts = torch.zeros_like(self.counts)
        counts[int(reference)] = found.to(counts.device)
        self.counts = self.counts + counts

    def compute(self) -> dict[str, Tensor]:
        """Of each property the share ``name``, that of the control ``name_reference``, and ``name_change``.

        The change has a ``_lower`` and an ``_upper`` end: Newcombe's interval. nan where nothing was seen.
        """
        (*found, total), (*ref_found, ref_total) = self.counts
        values: dict[str, Tensor] = {}
        for name, k, k0 in zip(self.names, found, ref_found, strict=True):
            lower, upper = newcombe_interval(k, total, k0, ref_total, confidence=self.confidence)
            share, ref_share = k / total, k0 / ref_total
            values |= {name: share, f"{name}_reference": ref_share, f"{name}_change": share - ref_share}
            values |= {f"{name}_change_lower": lower, f"{name}_change_upper": upper}
        return values


class MeanChange(_Float64States):
    """Base of detectors that measure: the mean of some values, and its change against the control.

    Args:
        names: Of the values.
        confidence: Of the intervals, in (0, 1).

    Raises:
        ValueError: If ``confidence`` is out of range.

    Example:
        >>> metric = MeanChange(("length",))
        >>> metric.update(torch.tensor([[4.0], [6.0]]))
        >>> metric.update(torch.tensor([[1.0], [3.0]]), reference=True)
        >>> metric.compute()["length_change"]
        tensor(3., dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    policy_moments: Tensor
    control_moments: Tensor

    def __init__(self, names: tuple[str, ...], *, confidence: float = 0.95) -> None:
        super().__init__()
        wilson_interval(0, 0, confidence=confidence)
        self.names = names
        self.confidence = confidence
        size = 1 + len(names) + len(names) ** 2
        for state in ("policy_moments", "control_moments"):
            self.add_state(state, torch.zeros(size, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, values: Tensor, *, reference: bool = False) -> None:
        """Add samples: each value of each, ``(N, len(names))``; of the control where asked."""
        state = "control_moments" if reference else "policy_moments"
        old = getattr(self, state)
        setattr(self, state, merge_moments(torch.stack([old, moments(*values.to(old.device).T)])))

    def compute(self) -> dict[str, Tensor]:
        """Of each value the mean ``name``, that of the control ``name_reference``, and ``name_change``.

        The change has a ``_lower`` and an ``_upper`` end: the normal interval of Welch's difference. nan where too
        little was seen.

        Raises:
            ValueError: If a value since the last reset was not finite.
        """
        require_finite_states(self, "values", torch.cat([self.policy_moments, self.control_moments]))
        z = NormalDist().inv_cdf((1 + self.confidence) / 2)
        (mean, error), (ref_mean, ref_error) = (
            _mean_and_error(m) for m in (self.policy_moments, self.control_moments)
        )
        change, half = mean - ref_mean, z * torch.hypot(error, ref_error)
        values: dict[str, Tensor] = {}
        for i, name in enumerate(self.names):
            values |= {name: mean[i], f"{name}_reference": ref_mean[i], f"{name}_change": change[i]}
            values |= {
                f"{name}_change_lower": change[i] - half[i],
                f"{name}_change_upper": change[i] + half[i],
            }
        return values


def _mean_and_error(whole: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = mean_and_std_of_moments(whole)
    return mean, std / whole[0].sqrt()
