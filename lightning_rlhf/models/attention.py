"""Shared-prefix attention: completions of one prompt attend to it and to themselves, never to each other.

Registered with Transformers as ``shared_prefix``. The plan of a packed row travels to every layer as the keyword
``shared_prefix`` of the model's forward (a keyword and not a context, since gradient checkpointing runs the layer
again later). Without a plan the function is ordinary attention, so the same model also generates.

Backends, chosen by what the device and the model allow:

============  =============================================================================================
``segments``  one ``scaled_dot_product_attention`` a run of queries: CPU, and whatever the others can't do
``varlen``    ``torch.nn.attention.varlen`` on CUDA in half precision, from compute capability 8.0 (Ampere)
``flex``      FlexAttention on CUDA from 7.0 (Volta): soft-capped logits, attention sinks, float32, wide heads
============  =============================================================================================
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_rlhf.data.packing import Segment

NAME = "shared_prefix"
Backend = Literal["segments", "varlen", "flex"]
MAX_VARLEN_HEAD_DIM, MIN_FLEX_HEAD_DIM = 256, 16


@dataclass(eq=False)
class SharedPrefixPlan:
    """Which keys each run of queries of a packed row sees.

    Completions that nothing is learnt from can be a second forward, without gradient, after the one that computed
    their prompts: its plan names the plan before it, whose keys and values come first.

    Attributes:
        segments: They cover the queries in order: a prompt with its first completion is one plain causal run; every
            further completion is a run that also sees the prompt.
        position_ids: Of the queries, ``(T,)``.
        after: The plan of the forward before, if this one goes on after it.
        kept: Where a forward leaves the keys and values of its layers for one after it; None to leave none.
        backend: Force a backend; by default :func:`choose_backend` picks it.
    """

    segments: Sequence[Segment]
    position_ids: Tensor
    after: "SharedPrefixPlan | None" = None
    kept: dict[nn.Module, tuple[Tensor, Tensor]] | None = None
    backend: Backend | None = None
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict, init=False)

    @cached_property
    def lengths(self) -> list[int]:
        """Queries a run."""
        return [segment.end - segment.start for segment in self.segments]

    @cached_property
    def key_lengths(self) -> list[int]:
        """Keys a run, those of the forward before first."""
        return [*(self.after.lengths if self.after else ()), *self.lengths]

    @cached_property
    def prompts(self) -> list[tuple[int, int]]:
        """For each run the run that holds its prompt, and how many of that run's tokens it sees; (-1, 0) for none."""
        runs = [*(self.after.segments if self.after else ()), *self.segments]
        first_at = {segment.start: index for index, segment in enumerate(runs)}
        return [
            (first_at[s.prompt_start], s.prompt_end - s.prompt_start)
            if s.prompt_end > s.prompt_start
            else (-1, 0)
            for s in self.segments
        ]

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Index of every key in the row, cumulated query and key lengths (int32), and the longest of both."""
        device = self.position_ids.device
        keys = [
            torch.cat([torch.arange(s.prompt_start, s.prompt_end), torch.arange(s.start, s.end)])
            for s in self.segments
        ]
        key_lengths = [len(k) for k in keys]

        def offsets(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)

        index = torch.cat(keys).to(device, non_blocking=True)
        return index, offsets(self.lengths), offsets(key_lengths), max(self.lengths), max(key_lengths)

    def with_keys_before(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, those of the forward before first; left for one after it where asked."""
        if self.kept is not None:
            self.kept[module] = (key.detach(), value.detach())
        if self.after is None or self.after.kept is None:
            return key, value
        key_before, value_before = self.after.kept[module]
        return torch.cat([key_before, key], dim=2), torch.cat([value_before, value], dim=2)

    def block_mask(self, window: int | None) -> BlockMask:
        """FlexAttention's mask for a layer with this sliding window; built once a batch and window."""
        if window not in self._block_masks:
            self._block_masks[window] = self._new_block_mask(window)
        return self._block_masks[window]

    def _new_block_mask(self, window: int | None) -> BlockMask:
        device, before = self.position_ids.device, self.segments[0].start
        places = torch.tensor(self.segments).repeat_interleave(torch.tensor(self.lengths), dim=0).to(device)
        start, _, prompt_start, prompt_end = places.unbind(1)  # of the run of every query
        position = self.position_ids
        if self.after is not None:
            position = torch.cat([self.after.position_ids, position])

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            of_prompt = (key >= prompt_start[query]) & (key < prompt_end[query])
            allowed = of_prompt | ((key >= start[query]) & (key <= query + before))
            if window is not None:
                allowed = allowed & (position[query + before] - position[key] < window)
            return allowed

        return create_block_mask(sees, None, None, len(start), len(position), device=device)


def choose_backend(query: Tensor, *, softcap: float | None, sinks: Tensor | None, dropout: float) -> Backend:
    """The fastest backend that the device has, and that honours everything the layer asks for.

    Args:
        query: ``(1, heads, T, head_dim)``.
        softcap: Cap of the attention logits, if the model has one.
        sinks: Learned logits of attention sinks, if the model has them.
        dropout: Attention dropout; only ``segments`` has it.

    Returns:
        The backend's name.

    Example:
        >>> choose_backend(torch.zeros(1, 1, 2, 8), softcap=None, sinks=None, dropout=0.0)
        'segments'
    """
    if query.device.type != "cuda":
        return "segments"
    plain = softcap is None and sinks is None
    return backend_of_cuda(
        torch.cuda.get_device_capability(query.device),
        query.dtype,
        query.shape[-1],
        plain=plain,
        dropout=dropout > 0,
    )


def backend_of_cuda(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, *, plain: bool, dropout: bool
) -> Backend:
    """The fastest backend on a GPU.

    Args:
        capability: Of the GPU.
        dtype: Of the queries.
        head_dim: Of the queries.
        plain: Whether the logits are left alone: neither capped nor joined by a sink's.
        dropout: Whether weights are dropped.

    Returns:
        The backend's name.

    Example:
        >>> backend_of_cuda((9, 0), torch.bfloat16, 128, plain=True, dropout=False)
        'varlen'
        >>> backend_of_cuda((7, 5), torch.float16, 128, plain=True, dropout=False)
        'flex'
    """
    if dropout or capability < (7, 0):
        return "segments"
    half = dtype in (torch.bfloat16, torch.float16)
    if plain and half and head_dim <= MAX_VARLEN_HEAD_DIM and capability >= (8, 0):
        return "varlen"
    return "flex" if head_dim >= MIN_FLEX_HEAD_DIM else "segments"


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    shared_prefix: SharedPrefixPlan | None = None,
    **kwargs: Any,  # noqa: ANN401 - Transformers' attention interface is open
) -> tuple[Tensor, None]:
    """The attention function that Transformers calls in every layer (its ``AttentionInterface``).

    Args:
        module: The attention layer.
        query: ``(B, heads, T, head_dim)``; B is 1 where a plan is given.
        key: ``(B, key-value heads, S, head_dim)``.
        value: Like ``key``.
        attention_mask: As made by ``sdpa``'s mask function; not read where a plan is given.
        dropout: Probability of attention dropout.
        scaling: Factor of the logits; 1/√head_dim by default.
        sliding_window: Positions that a query sees, itself included.
        softcap: Logits become ``softcap · tanh(logits / softcap)``.
        s_aux: A logit per head for an attention sink: a key that is always there and has no value.
        shared_prefix: The plan of a packed row, or None for ordinary attention.
        kwargs: What other attention functions take; handed on to ``sdpa``.

    Returns:
        ``(B, T, heads, head_dim)``, and None for the weights.
    """
    if shared_prefix is None:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if attention_mask is None:
            attention_mask = causal_mask(query.shape[2], key.shape[2], None, query.device)
        output = _eager(query, key, value, attention_mask, dropout, scaling, softcap, s_aux)
        return output.transpose(1, 2), None
    key, value = shared_prefix.with_keys_before(module, key, value)
    backend = shared_prefix.backend or choose_backend(query, softcap=softcap, sinks=s_aux, dropout=dropout)
    if backend == "segments":
        return _by_segments(
            query, key, value, shared_prefix, dropout, scaling, sliding_window, softcap, s_aux
        ), None
    if backend == "varlen":
        return _by_varlen(query, key, value, shared_prefix, scaling, sliding_window), None
    return _by_flex(query, key, value, shared_prefix, scaling, sliding_window, softcap, s_aux), None


def _by_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SharedPrefixPlan,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    # `split` and not slices: the backward of a slice fills a tensor of the whole row, once a segment.
    queries = query.split(plan.lengths, dim=2)
    keys, values = key.split(plan.key_lengths, dim=2), value.split(plan.key_lengths, dim=2)
    own = slice(len(keys) - len(queries), None)
    outputs = []
    for q, k, v, (prompt, seen) in zip(queries, keys[own], values[own], plan.prompts, strict=True):
        if seen:
            k = torch.cat([keys[prompt][:, :, :seen], k], dim=2)
            v = torch.cat([values[prompt][:, :, :seen], v], dim=2)
        if softcap is None and sinks is None:
            plain = not seen and (window is None or k.shape[2] <= window)
            mask = None if plain else causal_mask(q.shape[2], k.shape[2], window, q.device)
            output = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=plain, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            mask = causal_mask(q.shape[2], k.shape[2], window, q.device)
            output = _eager(q, k, v, mask, dropout, scaling, softcap, sinks)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


@lru_cache(maxsize=256)
def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query sees a key; the last query stands at the last key."""
    at = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    seen = keys <= at
    return seen if window is None else seen & (keys > at - window)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention by its formula, for what the fused kernels leave out; softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.float().masked_fill(~mask, torch.finfo(torch.float32).min)
    if sinks is not None:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, dropout) @ value


def _by_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SharedPrefixPlan,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    index, query_offsets, key_offsets, max_queries, max_keys = plan.varlen
    # The kernel aligns its causal window to the last query and the last key, as a completion after its prompt is.
    left = -1 if window is None else window - 1
    output = cast(
        Tensor,
        varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1).index_select(0, index),
            value[0].transpose(0, 1).index_select(0, index),
            query_offsets,
            key_offsets,
            max_queries,
            max_keys,
            scale=scaling,
            window_size=(left, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        ),
    )
    return output[None]


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def _by_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SharedPrefixPlan,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    cap = softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, at: Tensor, to: Tensor) -> Tensor:
        return score if cap is None else cap * torch.tanh(score / cap)

    # Uncompiled it is FlexAttention's own reference, which is how it is tested where there is no GPU.
    reference = cast(Callable[..., Any], flex_attention)
    run = _compiled_flex() if query.device.type == "cuda" else reference
    output, aux = run(
        query,
        key,
        value,
        score_mod=capped if softcap is not None else None,
        block_mask=plan.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is not None:
        # A sink adds exp(sink) to the softmax's denominator, exp(lse), and nothing to its numerator.
        share = torch.sigmoid(aux.lse - sinks.float().reshape(1, -1, 1))
        output = output * share[..., None].to(output.dtype)
    return cast(Tensor, output.transpose(1, 2))


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
