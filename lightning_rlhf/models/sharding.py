"""FSDP2: weights, gradients and optimizer states spread over ranks; under a device mesh only."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from lightning_rlhf.models.language_model import LanguageModel
from lightning_rlhf.models.scorer import Head
from lightning_rlhf.models.sharding_fsdp1 import refuse_whole, unit_of, whole

__all__ = ["data_parallel", "gathered", "reshard", "shard", "shard_all", "writable"]


def shard_all(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every language model and head of a module that is not sharded yet.

    Args:
        module: Changed in place: its parameters become DTensors.
        mesh: Of one dimension.

    Raises:
        ValueError: If a parameter that requires a gradient is in none of them: no rank would average its gradient.
    """
    for part in list(module.modules()):
        if isinstance(part, FSDPModule):
            continue
        if isinstance(part, LanguageModel):
            shard(part, mesh)
        elif isinstance(part, Head):
            fully_shard(part, mesh=mesh, reshard_after_forward=False)
    refuse_whole([n for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)])


def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """The dimension of Lightning's mesh that data is spread over.

    Raises:
        ValueError: If the mesh has tensor parallelism as well, which no module here has a plan for.
    """
    size = mesh["tensor_parallel"].size()
    if size > 1:
        raise ValueError(
            f"the strategy has tensor_parallel_size {size}, and modules are sharded over data only: give "
            f"ModelParallelStrategy data_parallel_size: {mesh.size()} and tensor_parallel_size: 1 (its defaults mean "
            "tensor parallelism)"
        )
    return mesh["data_parallel"]


def shard(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Shard a language model: each decoder layer by itself, and the rest (embedding, norm, head) together.

    A layer is gathered for its forward and for its backward. The rest stays gathered from its forward to the end of
    the backward, since the vocabulary is projected in chunks, and the number of chunks differs between ranks.

    Args:
        model: Changed in place.
        mesh: Of one dimension.

    Raises:
        ValueError: If Transformers does not say which modules are the model's layers.
    """
    model.stored = frozenset(_quantized(model))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for method in ("hidden_states", "touch"):
        register_fsdp_forward_method(model, method)


def _quantized(model: LanguageModel) -> list[str]:
    """The names of 4-bit weights, which are stored as if they were numbers of another dtype."""
    if getattr(model.config, "quantization_config", None) is None:
        return []
    from bitsandbytes.nn import Params4bit

    return [name for name, parameter in model.named_parameters() if isinstance(parameter, Params4bit)]


def reshard(module: nn.Module) -> None:
    """Free gathered weights: what is trained or copied next are the shards."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def writable(*modules: nn.Module) -> Iterator[None]:
    """Within, weights may be set: shards of FSDP2, and whole ones that become shards again of FSDP1.

    Args:
        modules: Which share no weights.
    """
    with ExitStack() as stack:
        for module in modules:
            reshard(module)  # else copies of the weights would be changed
            stack.enter_context(FullyShardedDataParallel.summon_full_params(module))
        yield


@contextmanager
def gathered(*models: LanguageModel) -> Iterator[None]:
    """Keep the whole weights of models on every rank: forwards within need no other rank, and may differ in number.

    Every rank must enter, and in the same order. Models that are not sharded are left alone, and within another
    such context nothing happens.

    Args:
        models: To gather.
    """
    with ExitStack() as stack:
        for model in models:
            if model.is_gathered:
                continue
            if unit_of(model) is not None:
                stack.enter_context(whole(model))
            elif isinstance(model, FSDPModule):
                stack.enter_context(_gathered(model))
        yield


@contextmanager
def _gathered(model: LanguageModel) -> Iterator[None]:
    model.touch()  # the model itself before its layers, so that they know whose they are
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    model.is_gathered = True
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        model.is_gathered = False
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()
