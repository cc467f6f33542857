"""Optimizer and learning-rate schedule by name."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_rlhf.models.settings import check_choice

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd"]
ScheduleName = Literal["cosine", "linear", "constant", "constant_with_warmup"]
LORA_B = re.compile(r"\.lora_(embedding_)?B\.")


@dataclass(frozen=True)
class Optimization:
    """How the trainable parameters are updated.

    Attributes:
        lr: Peak learning rate.
        name: ``adamw``, or one that bitsandbytes keeps in 8 bits or in paged memory.
        weight_decay: Decoupled; on matrices only, never on biases and norms.
        betas: Adam's decay rates.
        eps: Adam's ε.
        schedule: Of the learning rate, after the warmup.
        warmup_ratio: Share of all steps in which the rate rises linearly from 0.
        lora_plus_ratio: Learning rate of LoRA's B over that of A (LoRA+; Hayou et al., 2024, suggest 16); 1: none.
        allow_half_precision_weights: Fully fine-tune weights that are stored in half precision. With bfloat16
            weights and a rate of 1e-6 only 2% of them move in 100 steps, so this is refused unless asked for.
    """

    lr: float = 1e-5
    name: OptimizerName = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: ScheduleName = "cosine"
    warmup_ratio: float = 0.03
    lora_plus_ratio: float = 1.0
    allow_half_precision_weights: bool = False

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        check_choice("optimization.name", self.name, OptimizerName)
        check_choice("optimization.schedule", self.schedule, ScheduleName)
        if not isinstance(self.lr, int | float):
            raise TypeError(f"optimization.lr must be a number, got {self.lr!r}")
        if self.lr <= 0:
            raise ValueError(f"optimization.lr must be positive, got {self.lr}")
        if not 0.0 <= self.warmup_ratio < 1.0:
            raise ValueError(f"optimization.warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        if self.lora_plus_ratio <= 0:
            raise ValueError(f"optimization.lora_plus_ratio must be positive, got {self.lora_plus_ratio}")


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    settings: Optimization,
    lr_of: Callable[[str], float] | None = None,
    shapes: Mapping[str, Sequence[int] | None] | None = None,
) -> Optimizer:
    """An optimizer over the parameters that require gradients.

    Args:
        parameters: Names and parameters.
        settings: See :class:`Optimization`.
        lr_of: The learning rate of the parameter of a name, before ``lora_plus_ratio``; by default the settings'.
        shapes: What the parameters of FSDP1, which are flat shards, are cut from; by default they are whole.

    Returns:
        The optimizer; for each rate, one group that decays and one that does not.

    Raises:
        ValueError: If nothing is trainable, or an optimizer of bitsandbytes is asked for sharded parameters.
    """
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            sharded = isinstance(parameter, DTensor) or shapes is not None
            if sharded and settings.name not in ("adamw", "sgd"):
                raise ValueError(
                    f"optimization.name is {settings.name!r}, and bitsandbytes cannot update weights that are "
                    "sharded by FSDP: use adamw"
                )
            lr = settings.lr if lr_of is None else lr_of(name)
            if LORA_B.search(name):
                lr *= settings.lora_plus_ratio
            shape = parameter.shape if shapes is None else shapes[name] or ()
            decay = settings.weight_decay if len(shape) >= 2 else 0.0
            grouped.setdefault((lr, decay), []).append(parameter)
    if not grouped:
        raise ValueError("no parameter requires a gradient: there is nothing to train")
    groups = [
        {"params": several, "lr": lr, "weight_decay": decay} for (lr, decay), several in grouped.items()
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr)
    if settings.name == "adamw":
        adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
        # Let the gradients be unscaled before the step, not in it: Lightning refuses to clip them otherwise, under
        # bf16-mixed as well, where there is no scale at all.
        adamw._step_supports_amp_scaling = False
        return adamw
    import bitsandbytes as bnb

    optimizer = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }[settings.name]
    return optimizer(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def build_schedule(
    optimizer: Optimizer, settings: Optimization, num_steps: Callable[[], float]
) -> LRScheduler:
    """The learning rate over a run.

    Args:
        optimizer: Whose rate it sets.
        settings: See :class:`Optimization`.
        num_steps: Tells the optimizer steps of the whole run. It is asked at the second step at the earliest, since
            Lightning sets the data up to answer, and a resumed run has no position in it before it has started.

    Returns:
        A scheduler to step once an optimizer step.
    """

    def factor(step: int) -> float:
        if step == 0 or settings.schedule == "constant":
            return 0.0 if settings.warmup_ratio and settings.schedule != "constant" else 1.0
        return rate_factor(step, num_steps(), settings)

    return LambdaLR(optimizer, factor)


def rate_factor(step: int, num_steps: float, settings: Optimization) -> float:
    """Learning rate at a step as a share of its peak.

    Args:
        step: Optimizer steps done.
        num_steps: Optimizer steps of the whole run.
        settings: See :class:`Optimization`.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If the number of steps is infinite: the Trainer has no end, or the data no length.

    Example:
        >>> settings = Optimization(schedule="linear", warmup_ratio=0.2)
        >>> [rate_factor(step, 10, settings) for step in (1, 2, 6, 10)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if math.isinf(num_steps):
        raise ValueError(
            f"schedule {settings.schedule!r} needs the number of steps, and this run has no end, or its data no "
            "length: set max_steps, or choose optimization.schedule: constant"
        )
    warmup = math.ceil(settings.warmup_ratio * num_steps)
    if step < warmup:
        return step / warmup
    if settings.schedule in ("constant", "constant_with_warmup"):
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
