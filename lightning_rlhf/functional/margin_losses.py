r"""Losses of the margin between two log-ratios; one value per pair.

Throughout, $h_w = \log \pi(y_w) - \log \pi_{ref}(y_w)$ for the chosen completion, $h_l$ alike for the rejected one,
and $h = h_w - h_l$. Each of these losses accepts, in place of log-ratios, the scores of another divergence: see
:func:`lightning_rlhf.functional.divergence_scores`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.functional.ranges import check_label_smoothing, check_positive


def hinge_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""Hinge on the log-ratios: $\max(0, 1 - \beta h)$.

    SLiC-HF (Zhao et al., 2023) with likelihoods normalised by a reference, as Liu et al. (2023), "Statistical
    Rejection Sampling Improves Preference Optimization", write it.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Reciprocal of the margin aimed at, in nats.

    Returns:
        One loss per pair, ``(N,)``: 1 where policy and reference agree, 0 from a margin of 1/β nats on.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> zero = torch.zeros(3)
        >>> hinge_loss(torch.tensor([0.0, 1.0, 3.0]), zero, zero, zero, beta=0.5)
        tensor([1.0000, 0.5000, 0.0000])
    """
    check_positive("beta", beta)
    margin = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return torch.relu(1 - beta * margin)


def robust_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    r"""DPO's loss corrected for flipped labels.

    $[-(1 - \varepsilon) \log \sigma(\beta h) + \varepsilon \log \sigma(-\beta h)] / (1 - 2 \varepsilon)$:
    Chowdhury et al. (2024), "Provably Robust DPO": where a share ε of the labels is flipped at random, its mean over
    the flips is DPO's loss on the clean labels.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Strength of the KL anchor.
        label_smoothing: ε, the share of flipped labels, in [0, 0.5); 0 is DPO.

    Returns:
        One loss per pair, ``(N,)``; it may be negative.

    Raises:
        ValueError: If ``beta`` or ``label_smoothing`` is out of range.

    Example:
        >>> zero = torch.zeros(1)
        >>> robust_dpo_loss(torch.ones(1), zero, zero, zero, beta=1.0, label_smoothing=0.25)
        tensor([-0.1867])
    """
    check_positive("beta", beta)
    check_label_smoothing(label_smoothing)
    margin = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    kept, flipped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return (-(1 - label_smoothing) * kept + label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 1e-3,
) -> Tensor:
    r"""Efficient exact optimisation of pairs.

    $KL([q, 1 - q] \| [1 - \varepsilon, \varepsilon])$ with $q = \sigma(\beta h)$: equation 16
    of Ji et al. (2024), "Towards Efficient Exact Optimization of Language Model Alignment". DPO is the divergence the
    other way around.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Strength of the KL anchor.
        label_smoothing: ε, in (0, 0.5): a hard label would be infinitely far away.

    Returns:
        One loss per pair, ``(N,)``: 0 where $q = 1 - \varepsilon$.

    Raises:
        ValueError: If ``beta`` or ``label_smoothing`` is out of range.

    Example:
        >>> zero = torch.zeros(1)
        >>> exo_loss(torch.log(torch.tensor([3.0])), zero, zero, zero, beta=1.0, label_smoothing=0.25).abs() < 1e-6
        tensor([True])
    """
    check_positive("beta", beta)
    check_label_smoothing(label_smoothing)
    check_positive("label_smoothing", label_smoothing)
    margin = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    kept, flipped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    of_chosen = kept.exp() * (kept - math.log1p(-label_smoothing))
    return of_chosen + flipped.exp() * (flipped - math.log(label_smoothing))


def discopop_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    tau: float = 0.05,
) -> Tensor:
    r"""A loss found by search: $-(1 - w) \log \sigma(\beta h) + w e^{-\beta h}$ with $w = \sigma(\beta h / \tau)$.

    The log-ratio modulated loss, equation 5 of Lu et al. (2024), "Discovering Preference Optimization Algorithms with
    and for Large Language Models": logistic below a margin of 0, exponential above.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Strength of the KL anchor.
        tau: Width of the blend.

    Returns:
        One loss per pair, ``(N,)``: (ln 2 + 1)/2 where policy and reference agree.

    Raises:
        ValueError: If ``beta`` or ``tau`` is not positive.

    Example:
        >>> zero = torch.zeros(1)
        >>> discopop_loss(zero, zero, zero, zero, beta=0.1)
        tensor([0.8466])
    """
    check_positive("beta", beta)
    check_positive("tau", tau)
    logits = beta * ((policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps))
    blend = torch.sigmoid(logits / tau)
    return -F.logsigmoid(logits) * (1 - blend) + torch.exp(-logits) * blend
