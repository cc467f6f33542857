import copy
import random

import lightning as L
import torch

from lightning_rlhf.data.packing import PromptGroup
from tests.models.families import VOCABULARY


def random_groups(count, num_completions, seed=0):
    draw = random.Random(seed)
    ids = lambda low, high: [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(low, high))]  # noqa: E731
    return [
        PromptGroup(ids(1, 9), [ids(1, 9) for _ in range(num_completions)], row_id=row)
        for row in range(count)
    ]


def labelled(count, k=2, seed=0, labels=None):
    """Groups whose second completion is the one of the row before, as TRL pairs them."""
    groups = random_groups(count, 1, seed)
    labels = labels or [float(row % 3 != 1) for row in range(count)]
    return [
        PromptGroup(
            group.prompt,
            [group.completions[0], groups[row - 1].completions[0]][:k],
            row_id=row,
            extras={"label": labels[row]},
        )
        for row, group in enumerate(groups)
    ]


def away_from(model, seed=1, scale=0.02):
    """Another model near this one, so that no log-ratio is zero."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return other


class Gradients(L.Callback):
    """Keep the gradient that the optimizer sees at every step, and the logged losses."""

    def __init__(self):
        self.steps, self.losses = [], []

    def on_train_start(self, trainer, module):
        def keep(*_):
            self.steps.append(
                torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
            )

        trainer.optimizers[0].register_step_post_hook(keep)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        # The module logs after the callbacks of a batch's end, so each loss is read at the next start.
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_epoch_end(self, trainer, module):
        self.on_train_batch_start(trainer, module, None, 0)
