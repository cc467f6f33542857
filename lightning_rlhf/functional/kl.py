r"""Estimators of KL(π‖π_ref) from samples of π (Schulman, 2020, "Approximating KL divergence").

Each takes log-probabilities of tokens (or of whole sequences) that were sampled from π, and returns one value per
element: averaged over samples they estimate the divergence, in nats. With Δ = log π − log π_ref:

=========  ===============  ==============================================
``kl_k1``  Δ                unbiased, may be negative, large variance
``kl_k2``  Δ²/2             biased, never negative
``kl_k3``  e^{−Δ} − 1 + Δ   unbiased, never negative
=========  ===============  ==============================================
"""

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    r"""The plain estimator $\log \pi - \log \pi_{ref}$.

    Args:
        logprobs: Log-probabilities under the policy that the tokens were sampled from, any shape.
        ref_logprobs: Those under the reference, of the same shape.

    Returns:
        The same shape, in nats.

    Example:
        >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-3.0]))
        tensor([2.])
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    r"""Half of the squared log-ratio, $\Delta^2 / 2$.

    Args:
        logprobs: Log-probabilities under the policy that the tokens were sampled from, any shape.
        ref_logprobs: Those under the reference, of the same shape.

    Returns:
        The same shape, in nats, never negative.

    Example:
        >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-3.0]))
        tensor([2.])
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    r"""The control-variate estimator $e^{-\Delta} - 1 + \Delta$.

    Args:
        logprobs: Log-probabilities under the policy that the tokens were sampled from, any shape.
        ref_logprobs: Those under the reference, of the same shape.

    Returns:
        The same shape, in nats, never negative.

    Example:
        >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-3.0]))
        tensor([1.1353])
    """
    delta = logprobs - ref_logprobs
    return torch.expm1(-delta) + delta
