"""What Lightning's strategies do that an algorithm has to know, and what it refuses under them."""

import pickle
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor


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


def require_plain_checkpoint(path: str | Path | None) -> None:
    """Refuse a file that does more than hold weights and settings: Lightning's FSDPStrategy would execute it.

    Args:
        path: Of a checkpoint to go on from; None for none.

    Raises:
        ValueError: If it is such a file.
    """
    if path is None or not Path(path).is_file():
        return
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than weights and settings: {str(error)[:300]}") from error


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
