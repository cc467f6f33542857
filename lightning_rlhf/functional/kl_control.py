"""How strong the KL penalty is to be."""


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, num_episodes: int) -> float:
    r"""Move the coefficient towards a target KL.

    $\beta \cdot (1 + \mathrm{clip}(\mathrm{KL}/t - 1, -0.2, 0.2) \, n / h)$: the proportional
    controller of section 2.2 of Ziegler et al. (2019). The coefficient changes by a factor of 2 in about
    $h \ln 2 / 0.2 = 3.5 \, h$ episodes.

    Args:
        kl_coef: β, in reward per nat, positive.
        kl: KL(π‖π_ref) of a response, mean over the episodes, in nats: the sum over its tokens, not the mean.
        target: t, in nats a response, positive.
        horizon: h, in episodes, more than a fifth of ``num_episodes``.
        num_episodes: n, sampled since the last change, on all ranks.

    Returns:
        The new coefficient, in the host's float64: in bfloat16 it would not move at all.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(adaptive_kl_coef(0.1, 12.0, target=6.0, horizon=10_000, num_episodes=100), 6)
        0.1002
    """
    for name, value in (("kl_coef", kl_coef), ("target", target), ("horizon", horizon)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 < num_episodes < 5 * horizon:
        raise ValueError(
            f"num_episodes is {num_episodes} for a horizon of {horizon}: it must be at least 1, and less than 5 "
            "horizons, or the coefficient would fall to 0; raise the horizon"
        )
    if kl != kl:
        raise ValueError("kl is nan: the coefficient cannot follow it")
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return float(kl_coef * (1.0 + error * num_episodes / horizon))
