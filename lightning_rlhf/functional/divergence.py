"""Other divergences than the reverse KL to hold a policy near its reference."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# f'(t) at t = e^u. The largest exponent keeps e^u finite in float32.
LARGEST_EXPONENT = 80.0
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda u, alpha: u,
    "forward_kl": lambda u, alpha: -torch.expm1((-u).clamp(max=LARGEST_EXPONENT)),
    "js": lambda u, alpha: math.log(2) + F.logsigmoid(u),
    "alpha": lambda u, alpha: _alpha(u, alpha),
}


def divergence_scores(logratios: Tensor, *, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    r"""What takes the place of a log-ratio u under an f-divergence: $f'(e^u)$, up to a constant.

    ==============  ==================================================  ====================================
    ``reverse_kl``  $u$                                                 KL(π‖π_ref), DPO's own
    ``forward_kl``  $1 - e^{-u}$                                        KL(π_ref‖π)
    ``js``          $\log 2 + \log \sigma(u)$                           Jensen–Shannon
    ``alpha``       $(e^{(\alpha - 1) u} - 1) / (\alpha - 1)$           α: 1 is reverse KL, 0 is forward KL
    ==============  ==================================================  ====================================

    Theorem 1 of Wang et al. (2023), "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse
    Divergence Constraints". A loss of the margin between chosen and rejected takes these scores as they are.

    Args:
        logratios: $u = \log \pi - \log \pi_{ref}$ of whole completions, any shape, in nats.
        divergence: Which one.
        alpha: α; used by ``alpha`` only.

    Returns:
        The same shape.

    Raises:
        ValueError: If the divergence is unknown.

    Example:
        >>> u = torch.tensor([0.0, 1.0])
        >>> divergence_scores(u, divergence="forward_kl")
        tensor([0.0000, 0.6321])
        >>> divergence_scores(u, divergence="alpha", alpha=2.0)
        tensor([0.0000, 1.7183])
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    return DIVERGENCES[divergence](logratios, alpha)


def _alpha(u: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1.0) < 1e-6:
        return u
    return torch.expm1(((alpha - 1.0) * u).clamp(max=LARGEST_EXPONENT)) / (alpha - 1.0)
