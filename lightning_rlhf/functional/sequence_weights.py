"""Weights of tokens and of pairs: length desensitisation and WPO."""

import torch
from torch import Tensor

from lightning_rlhf.functional.logprobs import sum_by_sequence


def length_desensitized_sum(logprobs: Tensor, lengths: Tensor, *, ld_alpha: float) -> Tensor:
    r"""Sum tokens into sequences, those past the shorter answer's length with weight α.

    $\sum_{t \le \ell} \log \pi(y_t) + \alpha \sum_{t > \ell} \log \pi(y_t)$ with $\ell = \min(|y_w|, |y_l|)$: Liu et
    al. (2024), "Length Desensitization in Direct Preference Optimization".

    Args:
        logprobs: Values of the tokens of all sequences, one after the other, ``(M,)``.
        lengths: Tokens a sequence, ``(N,)``, integer, with sum M; sequences 2i and 2i + 1 are a pair.
        ld_alpha: α, in [0, 1]: 1 is the plain sum, 0 leaves the longer answer's rest out.

    Returns:
        One sum per sequence, ``(N,)``.

    Raises:
        ValueError: If ``ld_alpha`` is out of range or a sequence has no partner.

    Example:
        >>> logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0])
        >>> length_desensitized_sum(logprobs, torch.tensor([3, 1]), ld_alpha=0.5)
        tensor([-4., -8.])
    """
    if not 0.0 <= ld_alpha <= 1.0:
        raise ValueError(f"ld_alpha must lie in [0, 1], got {ld_alpha}")
    if len(lengths) % 2:
        raise ValueError(f"lengths must be those of pairs, got {len(lengths)} sequences")
    if ld_alpha == 1.0:
        return sum_by_sequence(logprobs, lengths)
    shared = lengths.view(-1, 2).amin(-1).repeat_interleave(2, output_size=len(lengths))
    starts = lengths.cumsum(0) - lengths
    # With its size given, no device has to be asked for it.
    last = (starts + shared).repeat_interleave(lengths, output_size=len(logprobs))
    tail = torch.arange(len(logprobs), device=logprobs.device) >= last
    return sum_by_sequence(torch.where(tail, ld_alpha * logprobs, logprobs), lengths)


def wpo_weights(logprobs: Tensor, log_collision: Tensor, lengths: Tensor) -> Tensor:
    r"""How likely the policy itself is to write each completion, for weighted preference optimisation.

    $w(y) = \exp(\frac{1}{|y|} \sum_t \log \frac{\pi(y_t)}{\sum_v \pi(v)^2})$: Zhou et al. (2024), "WPO: Enhancing
    RLHF with Weighted Preference Optimization", equation 2, with its alignment to sampled text. A pair's loss is
    multiplied by the product of both weights.

    Args:
        logprobs: Log-probabilities of the tokens of all completions, one after the other, ``(M,)``, in nats.
        log_collision: $\log \sum_v \pi(v)^2$ of the distribution each was predicted from, ``(M,)``.
        lengths: Tokens a completion, ``(N,)``, with sum M.

    Returns:
        One weight per completion, ``(N,)``, without gradient: 1 for what the policy samples on average.

    Example:
        >>> wpo_weights(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([1]))
        tensor([2.])
    """
    aligned = (logprobs - log_collision).detach()
    return torch.exp(sum_by_sequence(aligned, lengths) / lengths.clamp(min=1))
