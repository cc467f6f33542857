"""Checks of hyperparameters: a value out of range is named with what is allowed."""


def check_positive(name: str, value: float) -> None:
    """Refuse a hyperparameter that is not positive.

    Args:
        name: As the caller knows it.
        value: What was given.

    Raises:
        ValueError: If it is 0, negative or nan.

    Example:
        >>> check_positive("beta", 0.0)
        Traceback (most recent call last):
        ValueError: beta must be positive, got 0.0
    """
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def check_label_smoothing(value: float) -> None:
    """Refuse an assumed share of flipped labels that says nothing about which answer is better.

    Args:
        value: The share ε.

    Raises:
        ValueError: If it is outside of [0, 0.5).

    Example:
        >>> check_label_smoothing(0.5)
        Traceback (most recent call last):
        ValueError: label_smoothing must lie in [0, 0.5), got 0.5
    """
    if not 0.0 <= value < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {value}")
