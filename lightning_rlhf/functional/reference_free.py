"""Losses that need no reference; one value per pair."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.functional.preference import smoothed_logistic
from lightning_rlhf.functional.ranges import check_positive

Average = Literal["tokens", "sequences"]


def sft_term(chosen_logps: Tensor, chosen_lengths: Tensor, *, average: Average = "tokens") -> Tensor:
    r"""Negative log-likelihood of the chosen completions, a token: what keeps their probability from falling.

    With ``tokens``, $-\log \pi(y_w) \cdot N / \sum_j |y_{w,j}|$, whose mean over the batch is the mean over its
    tokens: TRL's term. The batch is what one call is given, in training the micro-batch of one process; long answers
    count more. With ``sequences``, $-\log \pi(y_w) / |y_w|$, the term of equation 2 of Hong et al. (2024): every
    answer counts the same, however a batch is cut.

    Args:
        chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        chosen_lengths: Their tokens, ``(N,)``.
        average: Over what the mean is.

    Returns:
        One value per pair, ``(N,)``, in nats a token.

    Raises:
        ValueError: If ``average`` is neither.

    Example:
        >>> sft_term(torch.tensor([-4.0, -6.0]), torch.tensor([1, 3]))
        tensor([2., 3.])
        >>> sft_term(torch.tensor([-4.0, -6.0]), torch.tensor([1, 3]), average="sequences")
        tensor([4., 2.])
    """
    if average not in ("tokens", "sequences"):
        raise ValueError(f"average must be 'tokens' or 'sequences', got {average!r}")
    lengths = chosen_lengths.to(chosen_logps.dtype)
    return -chosen_logps / (lengths.mean() if average == "tokens" else lengths).clamp(min=1)


def log_odds_ratio(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    r"""$\log \frac{\mathrm{odds}(y_w)}{\mathrm{odds}(y_l)}$ with $\mathrm{odds}(y) = \frac{p}{1 - p}$.

    $p = \exp(\log \pi(y) / |y|)$ is the geometric mean of the tokens' probabilities: equations 4 and 5 of Hong et al.
    (2024), "ORPO: Monolithic Preference Optimization without Reference Model".

    Args:
        chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        rejected_logps: Those of the other completions, ``(N,)``.
        chosen_lengths: Tokens of the preferred completions, ``(N,)``.
        rejected_lengths: Tokens of the other completions, ``(N,)``.

    Returns:
        One value per pair, ``(N,)``.

    Example:
        >>> half, fifth, one = torch.tensor([0.5]).log(), torch.tensor([0.2]).log(), torch.tensor([1])
        >>> log_odds_ratio(half, fifth, one, one).exp().round(decimals=3)
        tensor([4.])
    """
    chosen = chosen_logps / chosen_lengths.clamp(min=1)
    rejected = rejected_logps / rejected_lengths.clamp(min=1)
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    average: Average = "tokens",
) -> Tensor:
    r"""Odds ratio preference optimisation: :func:`sft_term` $- \beta \log \sigma(\log \mathrm{OR})$.

    Equations 6 and 7 of Hong et al. (2024), whose λ is β; see :func:`log_odds_ratio`. The likelihood term is that of
    the chosen completion; TRL's trains on its prompt as well.

    Args:
        chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        rejected_logps: Those of the other completions, ``(N,)``.
        chosen_lengths: Tokens of the preferred completions, ``(N,)``.
        rejected_lengths: Tokens of the other completions, ``(N,)``.
        beta: Weight of the odds ratio's term.
        average: See :func:`sft_term`.

    Returns:
        One loss per pair, ``(N,)``.

    Raises:
        ValueError: If ``beta`` is not positive or ``average`` unknown.

    Example:
        >>> half, one = torch.tensor([0.5]).log(), torch.tensor([1])
        >>> orpo_loss(half, half, one, one, beta=1.0)
        tensor([1.3863])
    """
    check_positive("beta", beta)
    odds = log_odds_ratio(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    return sft_term(chosen_logps, chosen_lengths, average=average) - beta * F.logsigmoid(odds)


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Simple preference optimisation.

    $-\log \sigma(\beta [\log \pi(y_w) / |y_w| - \log \pi(y_l) / |y_l|] - \gamma)$: equation 6
    of Meng et al. (2024), "SimPO: Simple Preference Optimization with a Reference-Free Reward".

    Args:
        chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        rejected_logps: Those of the other completions, ``(N,)``.
        chosen_lengths: Tokens of the preferred completions, ``(N,)``.
        rejected_lengths: Tokens of the other completions, ``(N,)``.
        beta: Scale of the reward, in reward per nat a token.
        gamma: The margin aimed at, in reward; not divided by β.
        label_smoothing: The assumed share of flipped labels, in [0, 0.5).

    Returns:
        One loss per pair, ``(N,)``.

    Raises:
        ValueError: If ``beta`` or ``label_smoothing`` is out of range.

    Example:
        >>> chosen, rejected = torch.tensor([-2.0]), torch.tensor([-8.0])
        >>> simpo_loss(chosen, rejected, torch.tensor([2]), torch.tensor([4]), beta=2.0, gamma=1.0)
        tensor([0.3133])
    """
    check_positive("beta", beta)
    margin = chosen_logps / chosen_lengths.clamp(min=1) - rejected_logps / rejected_lengths.clamp(min=1)
    return smoothed_logistic(beta * margin - gamma, label_smoothing=label_smoothing)


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float,
    cpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
    average: Average = "tokens",
) -> Tensor:
    r"""Contrastive preference optimisation.

    $-\log \sigma(\beta [\log \pi(y_w) - \log \pi(y_l)]) + \alpha \, \mathrm{NLL}(y_w)$: Xu et al. (2024),
    "Contrastive Preference Optimization". DPO with a uniform reference, and a likelihood term, :func:`sft_term`, that
    keeps the policy near the chosen completions.

    Args:
        chosen_logps: Log-probabilities of the preferred completions under the policy, ``(N,)``, in nats.
        rejected_logps: Those of the other completions, ``(N,)``.
        chosen_lengths: Tokens of the preferred completions, ``(N,)``.
        beta: Scale of the log-probabilities.
        cpo_alpha: Weight of the likelihood term, at least 0.
        label_smoothing: The assumed share of flipped labels, in [0, 0.5).
        average: See :func:`sft_term`.

    Returns:
        One loss per pair, ``(N,)``.

    Raises:
        ValueError: If a hyperparameter is out of range.

    Example:
        >>> logps, four = torch.tensor([-2.0]), torch.tensor([4])
        >>> cpo_loss(logps, logps, four, beta=0.1)
        tensor([1.1931])
    """
    check_positive("beta", beta)
    if cpo_alpha < 0:
        raise ValueError(f"cpo_alpha must not be negative, got {cpo_alpha}")
    losses = smoothed_logistic(beta * (chosen_logps - rejected_logps), label_smoothing=label_smoothing)
    return losses + cpo_alpha * sft_term(chosen_logps, chosen_lengths, average=average)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x ≤ 0, in the branch that loses no digits; a probability of 1 counts as 1 − ε of its dtype."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    small = x > -math.log(2)
    # Each branch sees harmless values where the other one is taken, so that no gradient is 0 · inf.
    return torch.where(
        small,
        torch.log(-torch.expm1(torch.where(small, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(small, -1.0, x))),
    )
