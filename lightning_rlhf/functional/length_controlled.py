"""How often one model beats another when both answer at the same length."""

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_finite, require_same_shape

__all__ = ["length_controlled_win_rate"]


def length_controlled_win_rate(
    wins: Tensor, lengths: Tensor, baseline_lengths: Tensor, *, ridge: float = 1e-3
) -> Tensor:
    r"""The win rate of a logistic model of wins and lengths, with its length term set to zero.

    $P(win) = \sigma(\theta + \phi \tanh(\Delta / s_\Delta))$ with Δ the difference in length and $s_\Delta$ its
    standard deviation is fitted by maximum likelihood, and $\sigma(\theta)$ returned: section 3 of Dubois et al.
    (2024), "Length-Controlled AlpacaEval", without its term for how hard each instruction is.

    Args:
        wins: 1 where the model won, 0 where it lost, ½ for a tie, or a judge's probability, ``(N,)``.
        lengths: Of its answers, ``(N,)``.
        baseline_lengths: Of the other model's answers, ``(N,)``.
        ridge: Weight of ½(θ² + φ²), which keeps both finite where all were won; positive.

    Returns:
        A scalar in (0, 1), float64.

    Raises:
        ValueError: If shapes differ, a win lies outside of [0, 1], nothing was compared, or a value is not finite.

    Example:
        >>> wins = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
        >>> longer = torch.tensor([9, 9, 9, 1, 1, 1, 5, 5])
        >>> length_controlled_win_rate(wins, longer, torch.full((8,), 5))
        tensor(0.5000, dtype=torch.float64)
    """
    require_same_shape("wins", wins, "lengths", lengths)
    require_same_shape("lengths", lengths, "baseline_lengths", baseline_lengths)
    for name, values in (("wins", wins), ("lengths", lengths), ("baseline_lengths", baseline_lengths)):
        require_finite(name, values)
    if not len(wins) or not ((wins >= 0) & (wins <= 1)).all():
        raise ValueError(f"wins must be at least one number in [0, 1], got {wins.tolist()[:5]}")
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    y = wins.detach().double()
    difference = lengths.double() - baseline_lengths.double()
    spread = difference.std(correction=0)
    length = torch.where(spread > 0, torch.tanh(difference / spread.clamp(min=1e-12)), 0.0)
    design = torch.stack([torch.ones_like(y), length], dim=1)
    penalty = ridge * torch.eye(2, dtype=y.dtype, device=y.device)
    parameters = y.new_zeros(2)
    # Newton's method in steps of at most 1: the objective is strictly convex, and so small a problem is soon solved.
    for _ in range(50):
        p = torch.sigmoid(design @ parameters)
        gradient = design.T @ (p - y) + penalty @ parameters
        hessian = (design * (p * (1 - p))[:, None]).T @ design + penalty
        parameters = parameters - torch.linalg.solve(hessian, gradient).clamp(-1.0, 1.0)
    return torch.sigmoid(parameters[0])
