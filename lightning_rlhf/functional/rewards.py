"""The reward of a token from the score of its completion."""

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_same_shape


def token_rewards(kl: Tensor, scores: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    r"""The reward of each token: $r_t = -\beta \, \mathrm{KL}_t$, and the score at the last one.

    Equation 2 of Ziegler et al. (2019), "Fine-Tuning Language Models from Human Preferences", spread over the tokens.

    Args:
        kl: Estimate of KL(π‖π_ref) at each token, such as :func:`kl_k1`, ``(N, T)``, in nats.
        scores: Of whole completions, ``(N,)``.
        mask: True where a token stands, ``(N, T)``, boolean, padded on the right.
        kl_coef: β, in reward per nat, at least 0.

    Returns:
        ``(N, T)``, 0 where the mask is False; a row's sum is $s - \beta \sum_t \mathrm{KL}_t$. A row without tokens has
        nowhere to put its score.

    Raises:
        ValueError: If ``kl_coef`` is negative or the shapes differ.

    Example:
        >>> kl, mask = torch.tensor([[0.5, 1.0, 9.0]]), torch.tensor([[True, True, False]])
        >>> token_rewards(kl, torch.tensor([2.0]), mask, kl_coef=0.5)
        tensor([[-0.2500,  1.5000,  0.0000]])
    """
    if kl_coef < 0:
        raise ValueError(f"kl_coef must not be negative, got {kl_coef}")
    require_same_shape("kl", kl, "mask", mask)
    require_same_shape("scores", scores, "the rows of kl", kl[:, 0] if kl.shape[1] else scores)
    is_last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    penalty = torch.where(mask, -kl_coef * kl, 0.0)
    return penalty + torch.where(is_last, scores[:, None].to(kl), 0.0)


def apply_missing_eos_penalty(
    scores: Tensor, truncated: Tensor, *, penalty: float | None = None, replacement: float | None = None
) -> Tensor:
    """Lower the scores of completions that did not end: by a penalty, or to a fixed score.

    Args:
        scores: Of whole completions, ``(N,)``.
        truncated: True where a completion was cut off before it ended, ``(N,)``, boolean.
        penalty: Subtracted, at least 0.
        replacement: Put in place of the score, whatever that was.

    Returns:
        ``(N,)``; the scores themselves where neither is given.

    Raises:
        ValueError: If both are given, the penalty is negative or the shapes differ.

    Example:
        >>> scores, truncated = torch.tensor([3.0, 3.0]), torch.tensor([False, True])
        >>> apply_missing_eos_penalty(scores, truncated, penalty=1.0)
        tensor([3., 2.])
        >>> apply_missing_eos_penalty(scores, truncated, replacement=-1.0)
        tensor([ 3., -1.])
    """
    if penalty is not None and replacement is not None:
        raise ValueError(f"give a penalty ({penalty}) or a replacement ({replacement}), not both")
    if penalty is not None and penalty < 0:
        raise ValueError(f"penalty is subtracted and must not be negative, got {penalty}")
    require_same_shape("scores", scores, "truncated", truncated)
    if replacement is not None:
        return torch.where(truncated, replacement, scores)
    return scores if penalty is None else torch.where(truncated, scores - penalty, scores)
