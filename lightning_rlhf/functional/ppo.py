"""Proximal policy optimisation: clipped losses, and what is watched while they fall.

Element by element, so that tokens may be laid end to end ``(M,)`` or padded ``(N, T)``.
"""

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_same_shape
from lightning_rlhf.functional.kl import kl_k2


def ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    r"""The probability ratio $\rho = \pi / \pi_{old}$.

    Args:
        logprobs: Log-probabilities of tokens under the policy, any shape.
        old_logprobs: Those under the policy that sampled them, of the same shape.

    Returns:
        The same shape.

    Example:
        >>> ratio(torch.tensor([0.0, -1.0]), torch.tensor([-1.0, -1.0]))
        tensor([2.7183, 1.0000])
    """
    return torch.exp(logprobs - old_logprobs)


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_range: float = 0.2
) -> Tensor:
    r"""The clipped surrogate, negated: $-\min(\rho A, \mathrm{clip}(\rho, 1 - \varepsilon, 1 + \varepsilon) A)$.

    Equation 7 of Schulman et al. (2017), "Proximal Policy Optimization Algorithms". At ρ = 1 its gradient is that of
    $-A \log \pi$.

    Args:
        logprobs: Log-probabilities of tokens under the policy, any shape.
        old_logprobs: Those under the policy that sampled them.
        advantages: Of each token; for an estimator by sequence, that of its sequence.
        clip_range: ε, in (0, 1).

    Returns:
        One loss per token. No gradient where ρ > 1 + ε and A > 0, or ρ < 1 − ε and A < 0.

    Raises:
        ValueError: If ``clip_range`` is out of range or the shapes differ.

    Example:
        >>> log_2 = torch.tensor([2.0, 2.0]).log()
        >>> ppo_policy_loss(log_2, torch.zeros(2), torch.tensor([1.0, -1.0]))
        tensor([-1.2000,  2.0000])
    """
    _check_clip_range(clip_range)
    require_same_shape("logprobs", logprobs, "old_logprobs", old_logprobs)
    require_same_shape("logprobs", logprobs, "advantages", advantages)
    rho = ratio(logprobs, old_logprobs)
    clipped = rho.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(-advantages * rho, -advantages * clipped)


def clip_fraction(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_range: float = 0.2
) -> Tensor:
    """Whether :func:`ppo_policy_loss` is clipped: 1 where the token has no gradient, else 0.

    Args:
        logprobs: Log-probabilities of tokens under the policy, any shape.
        old_logprobs: Those under the policy that sampled them.
        advantages: Of each token.
        clip_range: ε, in (0, 1).

    Returns:
        One value per token, float32; their mean is the fraction.

    Raises:
        ValueError: If ``clip_range`` is out of range.

    Example:
        >>> log_2 = torch.tensor([2.0, 2.0]).log()
        >>> clip_fraction(log_2, torch.zeros(2), torch.tensor([1.0, -1.0]))
        tensor([1., 0.])
    """
    _check_clip_range(clip_range)
    rho = ratio(logprobs, old_logprobs)
    above, below = rho > 1.0 + clip_range, rho < 1.0 - clip_range
    return ((above & (advantages > 0)) | (below & (advantages < 0))).float()


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    r"""How far the policy has moved from the one that sampled, $\frac12 (\log \pi - \log \pi_{old})^2$.

    An estimate of KL(π_old‖π) near 0, as logged by TRL and cleanrl: :func:`kl_k2`.

    Args:
        logprobs: Log-probabilities of tokens under the policy, any shape.
        old_logprobs: Those under the policy that sampled them.

    Returns:
        One value per token, in nats; their mean is the estimate.

    Example:
        >>> approx_kl(torch.tensor([-1.0]), torch.tensor([-3.0]))
        tensor([2.])
    """
    return kl_k2(old_logprobs, logprobs)


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip_range: float = 0.2
) -> Tensor:
    r"""The clipped squared error, $\frac12 \max((V - R)^2, (V_{clip} - R)^2)$.

    $V_{clip} = V_{old} + \mathrm{clip}(V - V_{old}, -\varepsilon, \varepsilon)$: the value loss of OpenAI's baselines
    and of TRL's PPO.

    Args:
        values: Values under the present parameters, any shape.
        old_values: Those at the time of sampling.
        returns: What they should be.
        value_clip_range: ε, positive, in units of the value; infinity for no clipping.

    Returns:
        One loss per token. No gradient where V is beyond the clip, and the clipped value is further from R than V is.

    Raises:
        ValueError: If ``value_clip_range`` is not positive or the shapes differ.

    Example:
        >>> ppo_value_loss(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]))
        tensor([1.6200, 0.5000])
    """
    plain, clipped = _value_losses(values, old_values, returns, value_clip_range)
    return 0.5 * torch.maximum(plain, clipped)


def value_clip_fraction(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip_range: float = 0.2
) -> Tensor:
    """Whether :func:`ppo_value_loss` is clipped: 1 where the token has no gradient, else 0.

    Args:
        values: Values under the present parameters, any shape.
        old_values: Those at the time of sampling.
        returns: What they should be.
        value_clip_range: ε, positive.

    Returns:
        One value per token, float32; their mean is the fraction.

    Raises:
        ValueError: If ``value_clip_range`` is not positive or the shapes differ.

    Example:
        >>> value_clip_fraction(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]))
        tensor([1., 0.])
    """
    plain, clipped = _value_losses(values, old_values, returns, value_clip_range)
    return (clipped > plain).float()


def truncated_importance_weights(logprobs: Tensor, behaviour_logprobs: Tensor, *, cap: float) -> Tensor:
    r"""How much more likely the trainer holds a token than what sampled it: $\min(\pi / \mu, c)$, without gradient.

    Corrects for a sampler (another engine, other kernels, another precision) whose probabilities are not quite the
    trainer's: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".

    Args:
        logprobs: Log-probabilities of tokens as the trainer computes them for the weights that sampled, any shape.
        behaviour_logprobs: Those that the sampler reports.
        cap: c, positive; bounds the variance.

    Returns:
        The same shape: what to multiply a token's loss by.

    Raises:
        ValueError: If ``cap`` is not positive or the shapes differ.

    Example:
        >>> truncated_importance_weights(torch.tensor([0.0, -2.0]), torch.tensor([-1.0, -1.0]), cap=2.0)
        tensor([2.0000, 0.3679])
    """
    if cap <= 0:
        raise ValueError(f"cap must be positive, got {cap}")
    require_same_shape("logprobs", logprobs, "behaviour_logprobs", behaviour_logprobs)
    return ratio(logprobs.detach(), behaviour_logprobs.detach()).clamp(max=cap)


def _check_clip_range(clip_range: float) -> None:
    if not 0.0 < clip_range < 1.0:
        raise ValueError(f"clip_range must lie in (0, 1), got {clip_range}")


def _value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip_range: float
) -> tuple[Tensor, Tensor]:
    if value_clip_range <= 0:
        raise ValueError(f"value_clip_range must be positive, got {value_clip_range}")
    require_same_shape("values", values, "old_values", old_values)
    require_same_shape("values", values, "returns", returns)
    clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    return (values - returns).square(), (clipped - returns).square()
