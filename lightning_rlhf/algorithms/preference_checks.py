"""What is refused before preference training, and what is warned of during it."""

import warnings

from torch import Tensor

from lightning_rlhf.objectives import Objective

LARGE_DISPLACEMENT = 0.5
"""Nats a token that the chosen completions may lose on average before a warning: 1.6 times less likely each."""


def check_options(objective: Objective, asks_for_reference: bool, ld_alpha: float, wpo: bool) -> None:
    """Refuse options of a preference algorithm that its objective cannot have.

    Args:
        objective: What is minimised.
        asks_for_reference: Whether a reference model or its stored log-probabilities are asked for.
        ld_alpha: Weight of the tokens past the shorter completion's length.
        wpo: Whether pairs are weighted.

    Raises:
        TypeError: If the objective is none.
        ValueError: If they do not fit.

    Example:
        >>> from lightning_rlhf.objectives import AOT
        >>> check_options(AOT(), False, 1.0, True)
        Traceback (most recent call last):
        ValueError: AOT sorts its batch, so that no weight a pair fits its losses: set wpo: false
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective must be one of lightning_rlhf.objectives, got {objective!r}: write, for example, "
            "objectives.Sigmoid(beta=0.1)"
        )
    name = type(objective).__name__
    if asks_for_reference and not objective.needs_reference:
        raise ValueError(f"{name} has no reference: leave out reference, and set precompute_reference: false")
    if not 0.0 <= ld_alpha <= 1.0:
        raise ValueError(f"ld_alpha must lie in [0, 1], got {ld_alpha}")
    if wpo and objective.sorts_batch:
        raise ValueError(f"{name} sorts its batch, so that no weight a pair fits its losses: set wpo: false")


def warn_of_displacement(change: Tensor) -> None:
    """Say that the chosen completions lose probability, and what helps.

    Args:
        change: Mean change of their log-probability since the reference, in nats a token; negative.
    """
    warnings.warn(
        f"likelihood displacement: the chosen completions of the validation data have lost {-change:.2f} nats a "
        "token since the reference, so probability moves to what nobody chose. What helps: a larger beta, a lower "
        "optimization.lr or fewer steps, Weighted with an SFTTerm, or APOZero as the objective",
        stacklevel=3,
    )
