r"""Losses that say where each log-ratio should be, not only their difference; one value per pair.

Throughout, $h_w = \log \pi(y_w) - \log \pi_{ref}(y_w)$ for the chosen completion, and $h_l$ alike for the rejected
one. A common shift of both changes these losses, so they hold against likelihood displacement, the chosen
completions losing probability together with the rejected ones (except :func:`apo_down_loss`, which asks for it).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.functional.ranges import check_positive


def nca_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""Noise contrastive alignment of pairs.

    $-\log \sigma(\beta h_w) - \frac{1}{2} \log \sigma(-\beta h_w) - \frac{1}{2} \log \sigma(-\beta h_l)$: Chen et al.
    (2024), "Noise Contrastive Alignment of Language Models with Explicit Rewards", for two completions and labels.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Strength of the KL anchor.

    Returns:
        One loss per pair, ``(N,)``: 2 ln 2 where policy and reference agree.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> zero = torch.zeros(1)
        >>> nca_loss(zero, zero, zero, zero, beta=0.1)
        tensor([1.3863])
    """
    check_positive("beta", beta)
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    reward_mean: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""Binary classifier optimisation: $-\log \sigma(\beta h_w - \delta) - \log \sigma(-(\beta h_l - \delta))$.

    Jung et al. (2024), "Binary Classifier Optimization for Large Language Model Alignment": a classifier that tells
    chosen from rejected, with δ the mean reward of both. TRL 1.16's ``bco_pair`` leaves δ at 0.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        reward_mean: δ, the running mean of all rewards $\beta h$, a scalar without gradient.
        beta: Strength of the KL anchor.

    Returns:
        One loss per pair, ``(N,)``: 2 ln 2 where policy and reference agree and δ is 0.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> zero = torch.zeros(1)
        >>> bco_loss(torch.tensor([2.0]), torch.tensor([2.0]), zero, zero, torch.tensor(1.0), beta=0.5)
        tensor([1.3863])
    """
    check_positive("beta", beta)
    chosen = beta * (policy_chosen_logps - ref_chosen_logps) - reward_mean
    rejected = beta * (policy_rejected_logps - ref_rejected_logps) - reward_mean
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""Self-play preference optimisation, hard labels: $(h_w - \frac{1}{2\beta})^2 + (h_l + \frac{1}{2\beta})^2$.

    Equation 4.7 of Wu et al. (2024), "Self-Play Preference Optimization for Language Model Alignment", whose η is
    1/β, with a win probability of 1 for the chosen completion and 0 for the rejected one.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Strength of the KL anchor: each log-ratio aims at 1/(2β) nats.

    Returns:
        One loss per pair, ``(N,)``: 1/(2β²) where policy and reference agree.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> sppo_loss(zero, zero, zero, zero, beta=0.5), sppo_loss(one, -one, zero, zero, beta=0.5)
        (tensor([2.]), tensor([0.]))
    """
    check_positive("beta", beta)
    chosen = policy_chosen_logps - ref_chosen_logps
    rejected = policy_rejected_logps - ref_rejected_logps
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_zero_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""Anchored preference optimisation, zero: $1 - \sigma(\beta h_w) + \sigma(\beta h_l)$.

    Equation 7 of D'Oosterlinck et al. (2024), "Anchored Preference Optimization and Contrastive Revisions": raises
    the chosen completion, lowers the rejected one. For chosen completions that are better than what the policy writes.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Strength of the KL anchor.

    Returns:
        One loss per pair, ``(N,)``, in (0, 2): 1 where policy and reference agree.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> zero = torch.zeros(1)
        >>> apo_zero_loss(torch.ones(1), zero, zero, zero, beta=1.0)
        tensor([0.7689])
    """
    check_positive("beta", beta)
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""Anchored preference optimisation, down: $\sigma(\beta h_w) + 1 - \sigma(\beta (h_w - h_l))$.

    Equation 8 of D'Oosterlinck et al. (2024): lowers both completions, the rejected one more. For chosen completions
    that are worse than what the policy writes.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Strength of the KL anchor.

    Returns:
        One loss per pair, ``(N,)``, in (0, 2): 1 where policy and reference agree.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> zero = torch.zeros(1)
        >>> apo_down_loss(zero, -torch.ones(1), zero, zero, beta=1.0)
        tensor([0.7689])
    """
    check_positive("beta", beta)
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
