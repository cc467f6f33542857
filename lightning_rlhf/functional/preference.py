"""Losses over a chosen and a rejected completion of one prompt; one value per pair."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.functional.ranges import check_label_smoothing, check_positive


def implicit_rewards(logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    r"""The reward that a policy implies, up to a constant per prompt: $\beta (\log \pi - \log \pi_{ref})$.

    Equation 5 of Rafailov et al. (2023), "Direct Preference Optimization", without its $\beta \log Z$.

    Args:
        logps: Log-probabilities of whole completions under the policy, ``(N,)``, in nats.
        ref_logps: Those under the reference, ``(N,)``.
        beta: Strength of the KL anchor, in reward per nat.

    Returns:
        One reward per completion, ``(N,)``.

    Example:
        >>> implicit_rewards(torch.tensor([-1.0]), torch.tensor([-3.0]), beta=0.5)
        tensor([1.])
    """
    return beta * (logps - ref_logps)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Direct preference optimisation, with optional conservative label smoothing.

    $-(1 - \varepsilon) \log \sigma(\beta h) - \varepsilon \log \sigma(-\beta h)$ with
    $h = (\log \pi(y_w) - \log \pi_{ref}(y_w)) - (\log \pi(y_l) - \log \pi_{ref}(y_l))$: equation 7 of Rafailov et
    al. (2023), and for $\varepsilon > 0$ Mitchell's cDPO, which assumes that a share ε of the labels is flipped.

    Args:
        policy_chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        policy_rejected_logps: Those of the other completions, ``(N,)``.
        ref_chosen_logps: Preferred completions under the reference, ``(N,)``.
        ref_rejected_logps: Other completions under the reference, ``(N,)``.
        beta: Strength of the KL anchor; larger stays closer to the reference.
        label_smoothing: ε, the assumed share of flipped labels, in [0, 0.5).

    Returns:
        One loss per pair, ``(N,)``: ln 2 where policy and reference agree.

    Raises:
        ValueError: If ``beta`` or ``label_smoothing`` is out of range.

    Example:
        >>> zero = torch.zeros(1)
        >>> dpo_loss(zero, zero, zero, zero, beta=0.1)
        tensor([0.6931])
        >>> dpo_loss(torch.ones(1), zero, zero, zero, beta=1.0)
        tensor([0.3133])
    """
    check_positive("beta", beta)
    margin = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return smoothed_logistic(beta * margin, label_smoothing=label_smoothing)


def smoothed_logistic(margin: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""The logistic loss of a margin, $-(1 - \varepsilon) \log \sigma(m) - \varepsilon \log \sigma(-m)$.

    Args:
        margin: By how much the chosen completion leads, ``(N,)``.
        label_smoothing: ε, the assumed share of flipped labels, in [0, 0.5).

    Returns:
        One loss per pair, ``(N,)``.

    Raises:
        ValueError: If ``label_smoothing`` is out of range.

    Example:
        >>> smoothed_logistic(torch.tensor([0.0, 1.0]))
        tensor([0.6931, 0.3133])
    """
    check_label_smoothing(label_smoothing)
    return -(1.0 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def pairwise_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Whether the chosen completion scores higher: 1, 0, or one half for a tie.

    Args:
        chosen: Scores or rewards of the preferred completions, ``(N,)``.
        rejected: Those of the other completions, ``(N,)``.

    Returns:
        One value per pair, ``(N,)``, float32. A tie counts one half, so that a policy equal to its reference
        has accuracy 0.5 and not 0.

    Example:
        >>> pairwise_accuracy(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
        tensor([1.0000, 0.0000, 0.5000])
    """
    return 0.5 * (1.0 + torch.sign(chosen.float() - rejected.float()))
