"""What Lightning's strategies do that an algorithm has to know, and what it refuses under them."""

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import ShardingStrategy

HALF_PRECISION = ("bf16-true", "16-true")


def require_sampling(trainer: L.Trainer, algorithm: str) -> None:
    """Refuse a strategy under which nothing can be sampled from the policy.

    Args:
        trainer: Of the run.
        algorithm: The name of what samples.

    Raises:
        ValueError: If ranks would wait for each other's completions, which differ in length.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{algorithm} samples from its policy, which {type(strategy).__name__} does not hand out whole: use "
            "ModelParallelStrategy (recipes/overlays/fsdp2.yaml) or DDPStrategy (recipes/overlays/ddp.yaml)"
        )


def shards_weights(strategy: Strategy) -> bool:
    """Whether weights are spread over ranks in units, so that every forward waits for all ranks."""
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def require_fsdp1(trainer: L.Trainer, strategy: FSDPStrategy) -> None:
    """Refuse settings of FSDP1 under which training would be wrong.

    Args:
        trainer: Of the run.
        strategy: The trainer's.

    Raises:
        ValueError: If shards would not be of all ranks, or adapters would be cast to half precision.
    """
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
    """Whether a strategy keeps the gradients to itself, so that they cannot be rescaled before the optimizer."""
    return isinstance(strategy, DeepSpeedStrategy)


def mean_over_ranks(losses: Tensor, world_size: int) -> Tensor:
    """What gives, averaged over ranks, the mean of the losses on all of them.

    Args:
        losses: One loss per token or pair, on this rank.
        world_size: Number of ranks.

    Example:
        >>> mean_over_ranks(torch.tensor([1.0, 3.0]), 1)
        tensor(2.)
    """
    count = torch.tensor(float(losses.numel()), device=losses.device)
    if world_size > 1:
        dist.all_reduce(count)
    return losses.sum() * world_size / count.clamp(min=1)
