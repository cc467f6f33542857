"""Alignment by optimal transport: losses that sort over the batch and compare quantile with quantile.

The batch is what one call is given: in training the micro-batch of one process. These losses therefore do depend on
how a batch is cut, and a batch of one pair is DPO's logistic loss. Values come in sorted order, not pair by pair.
"""

import torch
from torch import Tensor

from lightning_rlhf.functional.preference import smoothed_logistic
from lightning_rlhf.functional.ranges import check_positive


def aot_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Paired alignment via optimal transport: $-\log \sigma(\beta [\Delta_{(i)} - \Delta^{ref}_{(i)}])$.

    $\Delta = \log \pi(y_w) - \log \pi(y_l)$ and $\Delta^{ref}$ alike, each sorted over the batch: Melnyk et al.
    (2024), "Distributional Preference Alignment of LLMs via Optimal Transport". The policy's margins are to dominate
    the reference's in distribution.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Strength of the KL anchor.
        label_smoothing: The assumed share of flipped labels, in [0, 0.5).

    Returns:
        One loss per quantile, ``(N,)``: ln 2 where policy and reference agree.

    Raises:
        ValueError: If ``beta`` or ``label_smoothing`` is out of range.

    Example:
        >>> zero = torch.zeros(2)
        >>> aot_loss(torch.tensor([1.0, 0.0]), zero, torch.tensor([0.0, 1.0]), zero, beta=1.0)
        tensor([0.6931, 0.6931])
    """
    check_positive("beta", beta)
    policy = torch.sort(policy_chosen_logps - policy_rejected_logps).values
    reference = torch.sort(ref_chosen_logps - ref_rejected_logps).values
    return smoothed_logistic(beta * (policy - reference), label_smoothing=label_smoothing)


def aot_unpaired_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Unpaired alignment via optimal transport: $-\log \sigma(\beta [h_{w,(i)} - h_{l,(i)}])$.

    $h = \log \pi - \log \pi_{ref}$, those of chosen and of rejected completions each sorted over the batch: Melnyk et
    al. (2024). Which completion was compared with which does not matter.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Strength of the KL anchor.
        label_smoothing: The assumed share of flipped labels, in [0, 0.5).

    Returns:
        One loss per quantile, ``(N,)``: ln 2 where policy and reference agree.

    Raises:
        ValueError: If ``beta`` or ``label_smoothing`` is out of range.

    Example:
        >>> zero = torch.zeros(2)
        >>> aot_unpaired_loss(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0]), zero, zero, beta=1.0)
        tensor([0.3133, 0.3133])
    """
    check_positive("beta", beta)
    chosen = torch.sort(policy_chosen_logps - ref_chosen_logps).values
    rejected = torch.sort(policy_rejected_logps - ref_rejected_logps).values
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing=label_smoothing)
