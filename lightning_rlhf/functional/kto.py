"""Losses over single completions labelled desirable or undesirable; one value per completion."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    reference_point: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""Kahneman–Tversky optimisation: $w_y (1 - v)$.

    With $r = \log \pi(y) - \log \pi_{ref}(y)$ the value is $v = \sigma(\beta (r - z_0))$ of a desirable and
    $v = \sigma(\beta (z_0 - r))$ of an undesirable completion: equation 7 of Ethayarajh et al. (2024), "KTO: Model
    Alignment as Prospect Theoretic Optimization", with $w_y = \lambda_y$.

    Args:
        policy_logps: Log-probabilities of whole completions under the policy, ``(N,)``, in nats.
        ref_logps: Those under the reference, ``(N,)``.
        labels: Whether each is desirable, ``(N,)``: truth values, or 1 and 0.
        reference_point: $z_0$, in nats: see :func:`kto_reference_point`.
        beta: Strength of the KL anchor; it multiplies log-ratios and reference point alike.
        desirable_weight: $\lambda_D$. Equation 8 asks for $\lambda_D n_D / (\lambda_U n_U)$ between 1 and 4/3, where n
            are the numbers of answers.
        undesirable_weight: $\lambda_U$.

    Returns:
        One loss per completion, ``(N,)``: half of its weight where policy and reference agree and $z_0 = 0$.

    Raises:
        ValueError: If ``beta`` is not positive or a weight is negative.

    Example:
        >>> ratios, labels = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
        >>> kto_loss(ratios, torch.zeros(2), labels, 1.0, beta=1.0)  # 1 - σ(1) and 1 - σ(-1)
        tensor([0.2689, 0.7311])
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    for name, weight in (("desirable", desirable_weight), ("undesirable", undesirable_weight)):
        if weight < 0:
            raise ValueError(f"{name}_weight must not be negative, got {weight}")
    distance = beta * (policy_logps - ref_logps - reference_point)
    # 1 - σ(x) = σ(-x), which keeps its digits where σ(x) rounds to 1.
    desirable, undesirable = desirable_weight * F.sigmoid(-distance), undesirable_weight * F.sigmoid(distance)
    return torch.where(labels.bool(), desirable, undesirable)


def kto_reference_point(
    mismatched_policy_logps: Tensor,
    mismatched_ref_logps: Tensor,
    *,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""KTO's reference point $z_0 = \max(0, \text{mean}(\log \pi(y'|x) - \log \pi_{ref}(y'|x)))$.

    An estimate of KL(π‖π_ref) from completions y' of other prompts (Ethayarajh et al., 2024). β is not in it:
    :func:`kto_loss` multiplies it with the log-ratios. The mean is over the micro-batch on all ranks, as in the paper's
    code, so that it depends on how a batch is cut.

    Args:
        mismatched_policy_logps: Log-probabilities of completions given another's prompt under the policy, ``(M,)``.
        mismatched_ref_logps: Those under the reference, ``(M,)``.
        sum_over_ranks: Sums a tensor over all processes; None for one process. The mean is over all rows, however they
            are spread, and is cut off at 0 afterwards.

    Returns:
        A scalar in nats, without gradient.

    Example:
        >>> kto_reference_point(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.0]))
        tensor(1.5000)
        >>> kto_reference_point(torch.tensor([-3.0]), torch.tensor([-1.0]))
        tensor(0.)
    """
    ratios = (mismatched_policy_logps - mismatched_ref_logps).detach()
    parts = torch.stack([ratios.sum(), ratios.new_tensor(ratios.numel())])
    total, count = (parts if sum_over_ranks is None else sum_over_ranks(parts)).unbind()
    return (total / count).clamp(min=0)


def apo_zero_unpaired_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""APO-zero on unpaired completions: :func:`kto_loss` with the reference point 0.

    $1 - \sigma(\beta r)$ of a desirable and $\sigma(\beta r)$ of an undesirable completion: the terms of equation 7 of
    D'Oosterlinck et al. (2024), "Anchored Preference Optimization", each on its own. It pushes desirable answers up and
    undesirable ones down, whatever the policy does elsewhere: for answers that are better than the policy's own.

    Args:
        policy_logps: Log-probabilities of whole completions under the policy, ``(N,)``, in nats.
        ref_logps: Those under the reference, ``(N,)``.
        labels: Whether each is desirable, ``(N,)``.
        beta: Strength of the KL anchor.
        desirable_weight: Of the losses of desirable completions.
        undesirable_weight: Of the losses of undesirable completions.

    Returns:
        One loss per completion, ``(N,)``.

    Raises:
        ValueError: If ``beta`` is not positive or a weight is negative.

    Example:
        >>> ratios, labels = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
        >>> apo_zero_unpaired_loss(ratios, torch.zeros(2), labels, beta=1.0)
        tensor([0.2689, 0.7311])
    """
    return kto_loss(
        policy_logps,
        ref_logps,
        labels,
        0.0,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
