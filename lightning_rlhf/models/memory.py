"""What computing would take in memory, found by running it on tensors without data.

Under PyTorch's ``FakeTensorMode`` a model, its forward and its backward run as they would, on shapes and dtypes alone:
nothing is allocated. :class:`MemoryLedger` notes every storage that comes and goes, and so the most there was at a
time.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models.attention import causal_mask

ACTIVATIONS, LOGITS, GRADIENTS, HOST = "activations", "logits", "gradients", "host memory"
GROUPED = "aten::_grouped_mm"
MIN_8BIT, MIN_PAGED, BLOCK_8BIT = 4_096, 100_000, 256
"""bitsandbytes keeps smaller tensors' moments in float32, and pages none below the second; values an 8-bit scale."""


@dataclass(frozen=True)
class Peak:
    """The most bytes that were alive at a time.

    Attributes:
        parts: What they were for.
        most: The most that each part had, at times of their own.
    """

    parts: Mapping[str, int]
    most: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of them.

        Example:
            >>> Peak({"policy": 10, "activations": 5}).total
            15
        """
        return sum(self.parts.values())


class MemoryLedger(TorchDispatchMode):
    """Bytes of all storages made while it is active, by category, and their peak.

    What is new is an activation, or logits where its last dimension is the vocabulary; :meth:`mark` says otherwise.
    What is in the host's memory is not part of the peak.

    Args:
        vocab_size: Of the model.

    Example:
        >>> ledger = MemoryLedger(vocab_size=7)
        >>> with ledger.fake():
        ...     kept = torch.zeros(10, 7)
        ...     gone = torch.zeros(100) + 1
        >>> del gone
        >>> ledger.live["logits"], ledger.live["activations"], dict(ledger.peak.parts)
        (280, 0, {'logits': 280, 'activations': 800})
    """

    def __init__(self, vocab_size: int = 0) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.live: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self._total = self._peak_total = 0
        self._peak: dict[str, int] = {}
        # What libraries keep as constants has data, and may be computed with.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[int, tuple[weakref.ref[Any], str]] = {}

    @property
    def peak(self) -> Peak:
        """The most there was at a time since :meth:`reset_peak`."""
        parts = {name: size for name, size in self._peak.items() if size and name != HOST}
        return Peak(parts, dict(self.most))

    @contextmanager
    def fake(self) -> Iterator[None]:
        """Compute without data, and note what that would take."""
        with ExitStack() as stack:
            # A mask that is kept for the next layer has no data here, and must not meet a mask that has.
            causal_mask.cache_clear()
            stack.callback(causal_mask.cache_clear)
            stack.enter_context(self._mode)
            stack.enter_context(self)
            yield

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - PyTorch's interface
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Compute, and note what is new."""
        name = func.name()
        output = _by_experts(*args, **(kwargs or {})) if name == GROUPED else func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        if name in WORKSPACE:
            size = WORKSPACE[name](args)
            self.book(ACTIVATIONS, size)
            self.book(ACTIVATIONS, -size)
        return output

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        is_logits = self.vocab_size > 0 and tensor.ndim >= 2 and tensor.shape[-1] == self.vocab_size
        category = LOGITS if is_logits else ACTIVATIONS
        self._known[key] = (weakref.ref(storage, partial(self._forget, key, size)), category)
        self.book(category, size)

    def book(self, category: str, size: int) -> None:
        """Add bytes that are there until the end, or take some away."""
        self.live[category] += size
        self.most[category] = max(self.most[category], self.live[category])
        if category == HOST:
            return
        self._total += size
        if self._total > self._peak_total:
            self._peak_total, self._peak = self._total, dict(self.live)

    def _forget(self, key: int, size: int, _: object) -> None:
        self.book(self._known.pop(key)[1], -size)

    def hold(self, module: nn.Module, category_of: Callable[[str], str]) -> None:
        """Give the parameters and buffers of a module on the meta device storages, and book them.

        Args:
            module: Changed in place; what has a storage already keeps it.
            category_of: From the name of a parameter or buffer to its category.
        """
        made: dict[int, Tensor] = {}  # tied weights stay one
        with self.fake():
            for path, part in module.named_modules():
                for name, tensor in (*part._parameters.items(), *part._buffers.items()):
                    if tensor is None or tensor.device.type != "meta":
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = _with_storage(tensor)
                        self.mark(_parts(made[id(tensor)]), category_of(f"{path}.{name}"))
                    where = part._parameters if name in part._parameters else part._buffers
                    where[name] = made[id(tensor)]

    def mark(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what tensors that are alive are for; those in a category other than the two defaults keep it."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference, before = self._known.get(id(storage), (None, category))
            if reference is not None and before in (ACTIVATIONS, LOGITS):
                self._known[id(storage)] = (reference, category)
                self.book(before, -storage.nbytes())
                self.book(category, storage.nbytes())

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in the host's memory, booked there."""
        copied = tensor.clone()
        self.mark([copied], HOST)
        return copied

    def watch_gradients(self, module: nn.Module) -> None:
        """Book the gradients of a module's parameters as such, as soon as they are there."""

        def mark(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.mark([parameter.grad], GRADIENTS)

        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(mark)

    def reset_peak(self) -> None:
        """Let the peak be what is alive now."""
        self._peak_total, self._peak, self.most = self._total, dict(self.live), Counter(self.live)

    def without_data(self, batch: PackedBatch) -> PackedBatch:
        """A batch of the same shapes."""
        return batch._map(self._mode.from_tensor)


def _by_experts(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: Any = None,  # noqa: ANN401
) -> Tensor:
    """The result of a product grouped by experts, without data: PyTorch has a rule for bfloat16 only."""
    groups = [] if left.ndim == right.ndim - 1 or right.ndim == left.ndim - 1 else [_num_groups(left, offs)]
    return left.new_empty([*groups, left.shape[-2], right.shape[-1]], dtype=out_dtype)


def _num_groups(left: Tensor, offs: Tensor | None) -> int:
    return len(left) if offs is None else len(offs)


# What kernels use inside and give back: 4-bit weights, dequantised for a product.
WORKSPACE: dict[str, Callable[[Any], int]] = {
    "bitsandbytes::gemm_4bit": lambda args: math.prod(args[2]) * args[0].element_size(),
}


def _with_storage(tensor: Tensor) -> Tensor:
    """A tensor of the meta device on the CPU; one that is to be quantised, quantised."""
    if getattr(tensor, "has_fp16_weights", None) is not None:
        return _in_8_bits(tensor.shape)
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if getattr(tensor, "quant_type", None) is not None:
        return _packed(made, tensor)
    return (
        nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    )


def _in_8_bits(shape: torch.Size) -> Tensor:
    weight: Any = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
    weight.CB, weight.SCB = (
        weight.data,
        torch.empty(shape[0]),
    )  # the layer takes them over in its first forward
    return weight


def _packed(weight: Tensor, settings: Any) -> Tensor:  # noqa: ANN401 - bitsandbytes is not typed
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight,
        blocksize=settings.blocksize,
        compress_statistics=settings.compress_statistics,
        quant_type=settings.quant_type,
        quant_storage=settings.quant_storage,
    )
    parameter: Any = nn.Parameter(packed, requires_grad=False)
    parameter.quant_state = state
    return parameter


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, and of a quantised weight its scales."""
    yield tensor
    scales = getattr(tensor, "SCB", None)
    if scales is not None:
        yield scales
    state: Any = getattr(tensor, "quant_state", None)
    while state is not None:
        yield state.absmax
        state = state.state2


def moments_bytes(name: str, sizes: Iterable[int]) -> tuple[int, int]:
    """What an optimizer keeps beside its parameters.

    Args:
        name: As in :class:`~lightning_rlhf.Optimization`.
        sizes: Elements of each trainable tensor, in float32.

    Returns:
        Bytes on the device, and bytes in paged memory, which moves to the host where the device is full.

    Raises:
        ValueError: If there is no such optimizer.

    Example:
        >>> moments_bytes("adamw", [1_000_000]), moments_bytes("paged_adamw_8bit", [1_000_000, 64])
        ((8000000, 0), (31768, 2000000))
    """
    names = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd")
    if name not in names:
        raise ValueError(f"optimizer is {name!r}; it must be one of {', '.join(names)}")
    device = paged = 0
    for size in sizes:
        small = not name.endswith("8bit") or size < MIN_8BIT
        moments = 0 if name == "sgd" else 2 * size * (4 if small else 1)
        if name.startswith("paged") and size >= MIN_PAGED:
            paged += moments
        else:
            device += moments
        device += 0 if small else 2 * 4 * -(-size // BLOCK_8BIT)
    return device, paged
