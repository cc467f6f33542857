r"""Losses of the margin between two log-ratios a token, so that it does not grow with length; one value per pair.

$h_w = \log \pi(y_w) - \log \pi_{ref}(y_w)$ for the chosen completion, $h_l$ alike for the rejected one. In place of
log-ratios they accept the scores of another divergence: see :func:`lightning_rlhf.functional.divergence_scores`.
"""

from torch import Tensor

from lightning_rlhf.functional.preference import smoothed_logistic
from lightning_rlhf.functional.ranges import check_positive


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""Identity preference optimisation: $(h_w / |y_w| - h_l / |y_l| - \frac{1}{2 \beta})^2$.

    Equation 17 of Azar et al. (2023), "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    whose τ is β. The log-ratios are means over tokens, as in the authors' experiments: sums would make the target
    depend on length.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        chosen_lengths: Tokens of the preferred completions, ``(N,)``.
        rejected_lengths: Tokens of the other completions, ``(N,)``.
        beta: Strength of the KL anchor: the margin aimed at is 1/(2β) nats a token.

    Returns:
        One loss per pair, ``(N,)``: 1/(4β²) where policy and reference agree.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> import torch
        >>> zero, four = torch.zeros(1), torch.tensor([4])
        >>> ipo_loss(zero, zero, zero, zero, four, four, beta=0.5)
        tensor([1.])
        >>> ipo_loss(torch.tensor([4.0]), zero, zero, zero, four, four, beta=0.5)
        tensor([0.])
    """
    check_positive("beta", beta)
    chosen = (policy_chosen_logps - ref_chosen_logps) / chosen_lengths.clamp(min=1)
    rejected = (policy_rejected_logps - ref_rejected_logps) / rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)).square()


def length_normalized_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""DPO on log-ratios a token: $-\log \sigma(\beta [h_w / |y_w| - h_l / |y_l|])$.

    The length-normalised DPO of Lambert et al. (2024), "Tulu 3"; TRL's ``sigmoid_norm``.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        chosen_lengths: Tokens of the preferred completions, ``(N,)``.
        rejected_lengths: Tokens of the other completions, ``(N,)``.
        beta: Strength of the KL anchor per token; larger than DPO's by about the length of an answer.
        label_smoothing: The assumed share of flipped labels, in [0, 0.5).

    Returns:
        One loss per pair, ``(N,)``: ln 2 where policy and reference agree.

    Raises:
        ValueError: If ``beta`` or ``label_smoothing`` is out of range.

    Example:
        >>> import torch
        >>> zero, two = torch.zeros(1), torch.tensor([2])
        >>> length_normalized_dpo_loss(torch.tensor([2.0]), zero, zero, zero, two, two, beta=1.0)
        tensor([0.3133])
    """
    check_positive("beta", beta)
    chosen = (policy_chosen_logps - ref_chosen_logps) / chosen_lengths.clamp(min=1)
    rejected = (policy_rejected_logps - ref_rejected_logps) / rejected_lengths.clamp(min=1)
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing=label_smoothing)
