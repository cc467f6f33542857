"""FSDP1: language models and heads as units of their own, under Lightning's ``FSDPStrategy`` only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, wrap

from lightning_rlhf.models.language_model import LanguageModel
from lightning_rlhf.models.scorer import Head

WRAPPER = "_fsdp_wrapped_module."
"""What a unit puts into the names of its parameters."""

Result = TypeVar("Result")


def wrap_all(module: nn.Module, device: torch.device, precision: MixedPrecision | None) -> None:
    """Make a unit of every language model, each of its layers, and every trained head that is not one yet.

    Args:
        module: Changed in place, within Lightning's ``model_sharded_context``: elsewhere nothing happens.
        device: Of this rank.
        precision: Of the strategy.

    Raises:
        ValueError: If a parameter that requires a gradient is in none of them: no rank would average its gradient;
            or if weights of a model have several dtypes.
    """
    for part in list(module.modules()):
        if isinstance(part, LanguageModel) and unit_of(part) is None:
            _wrap_model(part, device, precision)
        elif not isinstance(part, FullyShardedDataParallel):
            for name, child in part.named_children():
                if isinstance(child, Head) and child.weight.requires_grad:
                    # In float32 whatever the precision, as without FSDP.
                    unit = wrap(child, device_id=device, mixed_precision=None, auto_wrap_policy=None)
                    setattr(part, name, unit)
    units = (part for part in module.modules() if isinstance(part, FullyShardedDataParallel))
    inside = {parameter for unit in units for parameter in unit.parameters()}
    refuse_whole([n for n, p in module.named_parameters() if p.requires_grad and p not in inside])


def refuse_whole(names: Sequence[str]) -> None:
    """Refuse parameters that would be trained and are not sharded: no rank would average their gradients.

    Raises:
        ValueError: If there is one.
    """
    if names:
        raise ValueError(
            f"{list(names[:3])} would be trained and are not sharded: FSDP averages gradients of language models and "
            "heads only. Use DDP"
        )


def _wrap_model(model: LanguageModel, device: torch.device, precision: MixedPrecision | None) -> None:
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if len(dtypes) > 1:
        raise ValueError(
            f"FSDP1 keeps weights together in one dtype, and these have {' and '.join(sorted(dtypes))}: give "
            "policy.dtype: float32, and 4 bits quantization.compute_dtype: float32, or use FSDP2"
        )
    # Weights in 4 bits are no numbers to cast, and positions are angles, which half precision would round.
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    casts = None if precision is None or is_quantized else replace(precision, buffer_dtype=None)
    layers = ModuleWrapPolicy({type(layer) for layer in model.layers})
    unit = wrap(model.model, device_id=device, auto_wrap_policy=layers, mixed_precision=casts)
    model._modules["model"] = unit
    for name in ("forward", "hidden_states", "of_hidden"):
        setattr(model, name, _within(model, unit, getattr(model, name)))


def _within(model: LanguageModel, unit: nn.Module, method: Callable[..., Result]) -> Callable[..., Result]:
    """A method that runs as its unit's forward: between the gathering of weights and the hooks for a backward."""
    inner = model.model

    def run(*args: object, **kwargs: object) -> Result:
        if model.is_gathered:
            return method(*args, **kwargs)
        inner.forward = partial(method, *args, **kwargs)  # type: ignore[method-assign]
        model.is_gathered = True
        try:
            found: Result = unit()
        finally:
            model.is_gathered = False
            del inner.forward
        return found

    return run


def unit_of(model: LanguageModel) -> FullyShardedDataParallel | None:
    """The unit of FSDP1 around a model; None where there is none."""
    found = model._modules["model"]
    return found if isinstance(found, FullyShardedDataParallel) else None


@contextmanager
def whole(model: LanguageModel) -> Iterator[None]:
    """All weights of a wrapped model on every rank, which forwards within take as they are."""
    units = [part for part in model.modules() if isinstance(part, FullyShardedDataParallel)]
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        model.is_gathered = True
        for unit in units:
            unit.forward = unit.module.__call__  # type: ignore[method-assign]
        try:
            yield
        finally:
            model.is_gathered = False
            for unit in units:
                del unit.forward


@contextmanager
def vocabulary(*models: LanguageModel) -> Iterator[None]:
    """The weights outside of layers, which FSDP2 leaves gathered after a forward and FSDP1 does not."""
    with ExitStack() as stack:
        for model in dict.fromkeys(models):
            unit = unit_of(model)
            if unit is not None and not model.is_gathered:
                stack.enter_context(unit.summon_full_params(unit, recurse=False, writeback=False))
        yield


def clip_shards(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scale gradients down to a norm, that of all ranks' shards together.

    Args:
        parameters: Every rank's are its shards.
        max_norm: Of the gradient.
    """
    several = [parameter for parameter in parameters if parameter.grad is not None]
    norm: Tensor = torch.nn.utils.get_total_norm([p.grad for p in several if p.grad is not None])
    # A rank whose shards hold nothing that is trained has no gradient, and joins with a 0.
    square = norm.square().to(parameters[0].device)
    dist.all_reduce(square)
    torch.nn.utils.clip_grads_with_norm_(several, max_norm, square.sqrt())
