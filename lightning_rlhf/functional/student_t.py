"""Student's t distribution with whole degrees of freedom: torch has no quantile of it."""

import math
from functools import lru_cache

__all__ = ["student_t_cdf", "student_t_quantile"]


def student_t_cdf(t: float, degrees: int) -> float:
    r"""$P(T \le t)$ for Student's t, by the finite series of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.

    Args:
        t: Any number.
        degrees: Of freedom, at least 1.

    Returns:
        A probability.

    Raises:
        ValueError: If ``degrees`` is less than 1.

    Example:
        >>> student_t_cdf(0.0, 3), round(student_t_cdf(1.0, 1), 6)
        (0.5, 0.75)
    """
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}")
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = 1.0, 0.0
    if degrees % 2:
        term = cosine
        for k in range(1, degrees - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        return 0.5 + (angle + sine * total) / math.pi
    for k in range(0, degrees, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 0.5 + sine * total / 2


@lru_cache(maxsize=256)
def student_t_quantile(probability: float, degrees: int) -> float:
    """The number that Student's t exceeds with probability 1 − p, by bisection.

    Args:
        probability: p, in (0, 1).
        degrees: Of freedom, at least 1.

    Returns:
        The quantile, to about 12 digits.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(student_t_quantile(0.975, 10), 4), round(student_t_quantile(0.75, 1), 4)
        (2.2281, 1.0)
    """
    if not 0.0 < probability < 1.0:
        raise ValueError(f"probability must lie in (0, 1), got {probability}")
    low, high = -1.0, 1.0
    while student_t_cdf(low, degrees) > probability:
        low *= 2
    while student_t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if student_t_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2
