"""What Lightning's strategies do that an algorithm has to know, and what it refuses under them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
)
from torch.distributed.fsdp import ShardingStrategy
from torch.optim import Optimizer

from lightning_rlhf.models.settings import Quantization

HALF_PRECISION = ("bf16-true", "16-true")


def require_zero_stage(strategy: Strategy) -> None:
    """Refuse the stages of DeepSpeed that nothing here is written for.

    Args:
        strategy: Of the run.

    Raises:
        ValueError: If it is one.
    """
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    assert strategy.config is not None
    stage = strategy.config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2):
        raise ValueError(
            f"DeepSpeed's ZeRO stage is {stage}: stage 3 splits weights up before they are loaded, and without ZeRO "
            "nothing is spread at all. Set stage: 2 or stage: 1; to spread weights too, use ModelParallelStrategy "
            "(recipes/overlays/fsdp2.yaml)"
        )


def require_storage(trainer: L.Trainer, quantization: Quantization | None, of: str = "policy") -> None:
    """Refuse 4-bit weights in a storage that DeepSpeed would round, as if it held numbers.

    Args:
        trainer: Of the run.
        quantization: Of a model.
        of: Which model that is.

    Raises:
        ValueError: If the storage is of another dtype than DeepSpeed's.
    """
    if not keeps_gradients(trainer.strategy) or quantization is None or quantization.bits != 4:
        return
    bits, _, _ = trainer.precision.partition("-")
    wanted = {"bf16": "bfloat16", "16": "float16", "32": "float32"}[bits]
    if quantization.compute_dtype != wanted:
        raise ValueError(
            f"DeepSpeed casts all weights to {wanted} under precision {trainer.precision!r}, and 4-bit weights are "
            f"stored as {quantization.compute_dtype}, of which nothing would be left: set "
            f"{of}.quantization.compute_dtype: {wanted}"
        )


def require_whole_steps(trainer: L.Trainer) -> None:
    """Refuse a step of micro-batches from two epochs: Lightning and DeepSpeed would count steps differently.

    Args:
        trainer: About to train.

    Raises:
        ValueError: If DeepSpeed would make one.
    """
    window, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if keeps_gradients(trainer.strategy) and batches != float("inf") and batches % window:
        raise ValueError(
            f"an epoch has {batches} batches, no multiple of accumulate_grad_batches {window}: DeepSpeed would carry "
            "the last ones over into the next epoch. Set trainer.limit_train_batches to a multiple, or "
            "accumulate_grad_batches: 1"
        )


def shards_weights(strategy: Strategy) -> bool:
    """Whether weights are spread over ranks in units, so that every forward waits for all ranks."""
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def require_fsdp1(trainer: L.Trainer) -> None:
    """Refuse settings of FSDP1 under which training would be wrong.

    Args:
        trainer: Of the run.

    Raises:
        ValueError: If shards would not be of all ranks, or adapters would be cast to half precision.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, FSDPStrategy):
        return
    if strategy.sharding_strategy not in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
        raise ValueError(
            f"FSDPStrategy has sharding_strategy {strategy.sharding_strategy.name}, and gradients are clipped by "
            "shards of all ranks: give FULL_SHARD or SHARD_GRAD_OP, or use DDPStrategy or ModelParallelStrategy"
        )
    if trainer.precision in HALF_PRECISION:
        raise ValueError(
            f"precision {trainer.precision!r} casts what is trained under FSDPStrategy: use 32-true, bf16-mixed or "
            "ModelParallelStrategy (recipes/overlays/fsdp2.yaml)"
        )


def keeps_gradients(strategy: Strategy) -> bool:
    """Whether a strategy keeps gradients and optimizer states to itself."""
    return isinstance(strategy, DeepSpeedStrategy)


def reduces_every_backward(strategy: Strategy) -> bool:
    """Whether each backward waits for all ranks, the ones within :func:`unsynchronised` too."""
    return isinstance(strategy, DeepSpeedStrategy) and bool(
        strategy.deepspeed_engine.zero_optimization_partition_gradients()
    )


def ends_step(strategy: Strategy) -> bool:
    """Whether the last backward was that of a step's last micro-batch: DeepSpeed is asked for a step after each."""
    return not isinstance(strategy, DeepSpeedStrategy) or bool(
        strategy.deepspeed_engine.is_gradient_accumulation_boundary()
    )


def scale_gradients(strategy: Strategy, optimizer: Optimizer, scale: float) -> None:
    """Multiply the gradients that the next step is taken with, before they are clipped.

    Args:
        strategy: Of the run.
        optimizer: What takes the step.
        scale: The factor.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        # It hands no gradient out, and divides by its loss scale when it takes the step. It has divided losses by the
        # number of micro-batches, as Lightning has before it: twice.
        zero: Any = strategy.optimizers[0]
        scale *= strategy.deepspeed_engine.gradient_accumulation_steps()
        zero.override_loss_scale(zero.loss_scaler.loss_scale / scale)
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if gradients:  # under FSDP1 a rank's shards may hold nothing that is trained
        torch._foreach_mul_(gradients, scale)


def unscale_losses(strategy: Strategy) -> None:
    """Before a backward: losses are not multiplied by what :func:`scale_gradients` divided the last step by."""
    if isinstance(strategy, DeepSpeedStrategy):
        zero: Any = strategy.optimizers[0]
        zero.override_loss_scale(zero.loss_scaler.loss_scale)


def clip_by_strategy(strategy: Strategy, max_norm: float | None) -> None:
    """Let a strategy that keeps the gradients clip them; it has to be told before it is set up.

    Args:
        strategy: Of the run.
        max_norm: None for no limit.

    Raises:
        ValueError: If the strategy was told another limit.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        assert strategy.config is not None
        told = strategy.config.get("gradient_clipping")
        if told not in (None, 0.0, max_norm):  # 0 is what Lightning puts in
            raise ValueError(
                f"the strategy's config has gradient_clipping: {told}, and update.max_grad_norm is {max_norm}: set the "
                "latter, and leave gradient_clipping out of the config"
            )
        strategy.config["gradient_clipping"] = max_norm or 0.0


@contextmanager
def unsynchronised(strategy: Strategy) -> Iterator[None]:
    """Within it, a backward leaves the gradient of this rank alone: it is averaged with the last micro-batch's.

    Args:
        strategy: Of the run.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        engine = strategy.deepspeed_engine
        engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            engine.set_gradient_accumulation_boundary(True)
    elif isinstance(strategy, ParallelStrategy):
        with strategy.block_backward_sync():
            yield
    else:
        yield
