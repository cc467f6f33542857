"""The supervised loss and its perplexity."""

import torch
from torch import Tensor


def sft_loss(logprobs: Tensor) -> Tensor:
    r"""Cross-entropy of the demonstrated token, $-\log \pi(y_t \mid x, y_{<t})$, one value per token.

    The mean over the tokens of an optimizer step is what is minimised; the algorithm takes it, because only it
    knows how many tokens the whole step holds.

    Args:
        logprobs: Log-probabilities of the demonstrated tokens, any shape, in nats.

    Returns:
        The same shape.

    Example:
        >>> sft_loss(torch.tensor([-0.5, -2.0]))
        tensor([0.5000, 2.0000])
    """
    return -logprobs


def perplexity(logprobs: Tensor) -> Tensor:
    r"""$\exp(-\frac{1}{n} \sum_t \log \pi(y_t))$: the effective number of tokens the model chooses among.

    Args:
        logprobs: Log-probabilities of the tokens that count, ``(n,)``, in nats.

    Returns:
        A scalar, at least 1.

    Example:
        >>> perplexity(torch.tensor([0.25, 0.25]).log())
        tensor(4.)
    """
    return torch.exp(-logprobs.mean())
