"""What a layer keeps for its backward: its input alone, or costly products as well; on the device or the host."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

KEPT_ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flex_attention",
    }
)
WIDEST = 8
"""A product is computed again where its result is this many times wider than what it sums over, as LoRA's B·(A·x)."""
SMALLEST_OFFLOADED = 2**16
"""Bytes; a smaller tensor is not worth a copy."""


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For the forward of a checkpointed layer, and for computing it again without the products that were kept."""
    forward, again = create_selective_checkpoint_contexts(_keeps)
    return forward, again


def _keeps(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ANN401
    name = op.name()
    kept = name in KEPT_ATTENTION or (name in SUMMED_OVER and _worth_keeping(*SUMMED_OVER[name](args)))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _worth_keeping(inner: int, outer: int) -> bool:
    """Whether a product costs enough for each number of its result.

    Example:
        >>> _worth_keeping(4096, 14336), _worth_keeping(16, 4096)
        (True, False)
    """
    return WIDEST * inner >= outer


# Of a product with weights: what it sums over, and how wide its result is. Not of experts: GPT-OSS changes its own in
# place.
SUMMED_OVER: dict[str, Callable[[Any], tuple[int, int]]] = {
    "aten::mm": lambda args: args[1].shape,
    "aten::addmm": lambda args: args[2].shape,
    "bitsandbytes::gemm_4bit": lambda args: args[2][::-1],
}


class HostMemory(saved_tensors_hooks):
    """While it is active, what autograd keeps goes to pinned host memory, and comes back when the backward needs it.

    Weights stay, and small tensors, and what is in host memory anyway.

    Args:
        to_host: Copies a tensor there.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> with HostMemory():  # on a CPU there is nothing to move
        ...     y = x.exp().sum()
        >>> y.backward()
    """

    def __init__(self, to_host: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(self._pack, self._unpack)
        self._to_host = to_host or pinned_copy

    def _pack(self, tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        if tensor.nbytes < SMALLEST_OFFLOADED or _is_weight(tensor):
            return None, tensor
        copied = self._to_host(tensor)
        return (None, tensor) if copied is tensor else (tensor.device, copied)

    @staticmethod
    def _unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
        device, tensor = packed
        # On the stream that computes, so that nothing reads it before it is there.
        return tensor if device is None else tensor.to(device, non_blocking=True, copy=True)


def _is_weight(tensor: Tensor) -> bool:
    base = tensor if tensor._base is None else tensor._base
    return isinstance(base, nn.Parameter)


def pinned_copy(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory; a tensor of the CPU itself."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
