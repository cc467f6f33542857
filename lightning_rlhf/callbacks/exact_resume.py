"""Random states in the checkpoint, so that a resumed run continues bit for bit."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback


class ExactResume(Callback):
    """Store every rank's random states with each checkpoint, and restore them at the first batch after resuming.

    With the package's datamodules, which store their position, losses and weights of a resumed run equal those of
    one that was never interrupted, bit for bit: on CPU, or on a GPU with deterministic kernels, and on the same
    number of ranks.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] | None = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the random states of all ranks into the checkpoint."""
        states: list[Any] = [random_states()]
        if dist.is_initialized() and trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, random_states())
        checkpoint["random_states"] = states

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep them until the first batch: between here and there Lightning draws random numbers itself."""
        self._states = checkpoint.get("random_states")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:  # noqa: ANN401
        """Restore them, once."""
        if self._states is None:
            return
        states, self._states = self._states, None
        if len(states) == trainer.world_size:
            restore_random_states(states[trainer.global_rank])


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators as plain lists, which ``weights_only`` can load."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set all generators to what :func:`random_states` returned.

    Example:
        >>> before = random_states()
        >>> first = torch.rand(3)
        >>> restore_random_states(before)
        >>> bool((torch.rand(3) == first).all())
        True
    """
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
