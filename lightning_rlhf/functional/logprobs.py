"""Log-probabilities of given tokens without a tensor of (all tokens × vocabulary)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

DEFAULT_CHUNK_SIZE = 512
BLOCK_ROWS_CPU = 16
BLOCK_ROWS_GPU = 128


class TokenLogprobs(NamedTuple):
    r"""What one pass over the vocabulary tells about each token.

    Attributes:
        logprobs: Log-probability of the token, ``(M,)``, float32, in nats.
        entropy: Entropy of the distribution it was predicted from, ``(M,)``, float32, in nats; None unless asked.
        correct: Whether the token was the likeliest one, ``(M,)``, boolean.
        log_collision: $\log \sum_v p(v)^2$ of that distribution, ``(M,)``, float32, without gradient; None unless
            asked.
    """

    logprobs: Tensor
    entropy: Tensor | None
    correct: Tensor
    log_collision: Tensor | None = None


class _LogSoftmaxAt(torch.autograd.Function):
    """(logits, targets) → log-softmax at the targets, entropy, is the target the largest logit, log Σ p².

    One function rather than ``log_softmax().gather()``: only the logits are kept, and all that is derived from them
    is computed in blocks of rows.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's context
        logits: Tensor,
        targets: Tensor,
        with_entropy: bool,
        with_collision: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        largest = logits.amax(-1, keepdim=True)
        at_target = (logits.gather(-1, targets[:, None]) - largest).squeeze(-1)
        total, entropy, squares = (torch.zeros_like(at_target) for _ in range(3))
        for rows in _row_blocks(logits):
            shifted = logits[rows] - largest[rows]
            weights = shifted.exp()
            total[rows] = weights.sum(-1)
            if with_collision:
                squares[rows] = weights.square().sum(-1)
            if with_entropy:
                entropy[rows] = weights.mul_(shifted).sum(-1)
        log_total = total.log()
        entropy = log_total - entropy / total
        correct = at_target == 0
        ctx.set_materialize_grads(False)  # an entropy that is only logged then costs nothing in the backward
        ctx.save_for_backward(logits, largest, log_total, targets, entropy)
        collision = squares.log() - 2 * log_total
        ctx.mark_non_differentiable(correct, collision)
        return at_target - log_total, entropy, correct, collision

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's context
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, None, None, None]:
        logits, largest, log_total, targets, entropy = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_total)
        # dlogp_t/dz_j = δ_tj − p_j and dH/dz_j = −p_j (log p_j + H)
        for rows in _row_blocks(logits):
            slope: Tensor = -grad_logprobs[rows, None]
            logp = torch.sub(logits[rows], largest[rows], out=gradient[rows]).sub_(log_total[rows, None])
            if grad_entropy is not None:
                slope = slope - grad_entropy[rows, None] * (logp + entropy[rows, None])
            logp.exp_().mul_(slope)
        return gradient.scatter_add_(-1, targets[:, None], grad_logprobs[:, None]), None, None, None


def _row_blocks(logits: Tensor) -> list[slice]:
    """Few rows on a CPU, whose cache holds them; on a GPU more, since each pass over a block is a launch."""
    size = BLOCK_ROWS_CPU if logits.device.type == "cpu" else BLOCK_ROWS_GPU
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def token_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_collision: bool = False,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> TokenLogprobs:
    r"""Log-probability of each target token, $\log \mathrm{softmax}(\mathrm{head}(h_i) / T)_{y_i}$.

    The vocabulary is projected in chunks of ``chunk_size`` positions, in the backward again except for the last
    chunk, so that the logits of one chunk exist at a time, and their gradient. Softmax and entropy are computed in
    float32 whatever the head's dtype.

    Args:
        hidden: The hidden states that predict the targets, ``(M, H)``.
        head: From hidden states ``(m, H)`` to logits ``(m, V)``: a linear layer, LoRA or a quantised layer, with
            whatever the model does to its logits (a soft cap, a scale).
        targets: Token ids, ``(M,)``.
        temperature: T, which divides the logits.
        with_entropy: Also return the entropy of each distribution (differentiable).
        with_collision: Also return the logarithm of its collision probability.
        chunk_size: Positions a chunk.

    Returns:
        See :class:`TokenLogprobs`. An empty input gives empty tensors that still carry a gradient.

    Raises:
        ValueError: If the temperature is not positive or the shapes disagree.

    Example:
        >>> hidden = torch.zeros(2, 3)
        >>> token_logprobs(hidden, torch.nn.Linear(3, 4, bias=False), torch.tensor([0, 3]), with_entropy=True)[:2]
        (tensor([-1.3863, -1.3863], grad_fn=<CatBackward0>), tensor([1.3863, 1.3863], grad_fn=<CatBackward0>))
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be (M, H) and targets (M,), got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )

    def of_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _LogSoftmaxAt.apply(
            _tempered(head(hidden), temperature), targets, with_entropy, with_collision
        )

    # The backward begins with the last chunk, so that one may keep its logits: the others compute theirs again when
    # it is gone. The short chunk comes first, for what is kept to be a full one.
    sizes = _chunk_sizes(len(hidden), chunk_size)
    *earlier, last = zip(hidden.split(sizes), targets.split(sizes), strict=True)
    if torch.is_grad_enabled():
        chunks = [checkpoint(of_chunk, h, t, use_reentrant=False) for h, t in earlier]
    else:
        chunks = [of_chunk(h, t) for h, t in earlier]
    logprobs, entropy, correct, collision = (
        torch.cat(parts) for parts in zip(*chunks, of_chunk(*last), strict=True)
    )
    return TokenLogprobs(
        logprobs, entropy if with_entropy else None, correct, collision if with_collision else None
    )


def _chunk_sizes(count: int, size: int) -> list[int]:
    first = count % size
    return [first] * (first > 0 or count == 0) + [size] * (count // size)


@torch.no_grad()
def token_kl(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    ref_hidden: Tensor,
    ref_head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> Tensor:
    r"""KL(π‖π_ref) at each position with the vocabulary summed out, $\sum_v \pi(v) (\log \pi(v) - \log \pi_{ref}(v))$.

    No estimate, unlike :func:`kl_k1` and its kin, and never negative. Logits of ``chunk_size`` positions exist at a
    time, of both models; softmax in float32. Without gradient.

    Args:
        hidden: The policy's hidden states that predict the tokens, ``(M, H)``.
        head: From the policy's hidden states ``(m, H)`` to its logits ``(m, V)``.
        ref_hidden: The reference's hidden states at the same positions, ``(M, H')``.
        ref_head: From those to the reference's logits ``(m, V)``. Called in turn with ``head``: where roles share one
            module, each has to switch to its own.
        temperature: Divides the logits of both: the distributions that are sampled from.
        chunk_size: Positions a chunk.

    Returns:
        ``(M,)``, float32, in nats.

    Raises:
        ValueError: If the temperature is not positive or the numbers of positions differ.

    Example:
        >>> logits, ref_logits = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0986, 0.0]])  # 1/2, 1/2 and 3/4, 1/4
        >>> token_kl(logits, lambda h: h, ref_logits, lambda h: h)
        tensor([0.1438])
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if hidden.ndim != 2 or ref_hidden.ndim != 2 or len(hidden) != len(ref_hidden):
        raise ValueError(
            f"hidden and ref_hidden must be (M, H) with the same M, got {tuple(hidden.shape)} and "
            f"{tuple(ref_hidden.shape)}"
        )
    chunks = zip(hidden.split(chunk_size), ref_hidden.split(chunk_size), strict=True)
    found = [_kl(head(h).float() / temperature, ref_head(r).float() / temperature) for h, r in chunks]
    return torch.cat(found)


def _kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    found = logits.new_empty(len(logits))
    for rows in _row_blocks(logits):
        logp, ref_logp = logits[rows].log_softmax(-1), ref_logits[rows].log_softmax(-1)
        found[rows] = (logp.exp() * (logp - ref_logp)).sum(-1)
    return found.clamp_(min=0.0)  # rounding of two distributions that are almost the same


class TokenComparison(NamedTuple):
    """What one pass over two vocabularies tells about each token.

    Attributes:
        logprobs: Log-probability of the token under the policy, ``(M,)``, float32, in nats.
        ref_logprobs: That under the reference, ``(M,)``.
        entropy: Of the policy's distribution, ``(M,)``, in nats.
        kl: KL(π‖π_ref) with the vocabulary summed out, ``(M,)``, in nats, never negative.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    kl: Tensor


@torch.no_grad()
def compare_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    ref_hidden: Tensor,
    ref_head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> TokenComparison:
    r"""Log-probabilities of the tokens under two models, entropy, and :func:`token_kl`, from the same logits.

    The policy's numbers are those of :func:`token_logprobs` bit for bit: the same chunks and the same operations. At
    the first step on these tokens every probability ratio is then exactly 1.

    Args:
        hidden: The policy's hidden states that predict the tokens, ``(M, H)``.
        head: From the policy's hidden states to its logits.
        ref_hidden: The reference's hidden states, ``(M, H')``.
        ref_head: From those to the reference's logits.
        targets: Token ids, ``(M,)``.
        temperature: Divides the logits of both.
        chunk_size: Positions a chunk.

    Returns:
        See :class:`TokenComparison`; without gradient.

    Raises:
        ValueError: If the temperature is not positive or the numbers of positions differ.

    Example:
        >>> logits, ref_logits = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0986, 0.0]])
        >>> found = compare_logprobs(logits, lambda h: h, ref_logits, lambda h: h, torch.tensor([0]))
        >>> found.logprobs, found.ref_logprobs, found.kl
        (tensor([-0.6931]), tensor([-0.2877]), tensor([0.1438]))
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not len(hidden) == len(ref_hidden) == len(targets):
        raise ValueError(
            f"hidden, ref_hidden and targets are of {len(hidden)}, {len(ref_hidden)} and {len(targets)} positions"
        )
    sizes = _chunk_sizes(len(hidden), chunk_size)
    parts = []
    for h, r, t in zip(hidden.split(sizes), ref_hidden.split(sizes), targets.split(sizes), strict=True):
        logits, ref_logits = (_tempered(f(x), temperature) for f, x in ((head, h), (ref_head, r)))
        logprobs, entropy, _, _ = _LogSoftmaxAt.apply(logits, t, True, False)
        ref_logprobs, *_ = _LogSoftmaxAt.apply(ref_logits, t, False, False)
        parts.append((logprobs, ref_logprobs, entropy, _kl(logits, ref_logits)))
    return TokenComparison(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


def sum_by_sequence(logprobs: Tensor, lengths: Tensor) -> Tensor:
    r"""Sum consecutive tokens into sequences: $\log \pi(y) = \sum_t \log \pi(y_t)$.

    Args:
        logprobs: Values of the tokens of all sequences, one after the other, ``(M,)``.
        lengths: Tokens a sequence, ``(N,)``, integer, with sum M.

    Returns:
        One sum per sequence, ``(N,)``; 0 for a sequence without tokens.

    Example:
        >>> sum_by_sequence(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 1]))
        tensor([3., 0., 3.])
    """
    return torch.segment_reduce(logprobs, "sum", lengths=lengths, initial=0.0)
