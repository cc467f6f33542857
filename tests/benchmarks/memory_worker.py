"""A training in a process of its own: the most memory it takes over what the imports took.

``python -m tests.benchmarks.memory_worker WARM_UP ARGUMENTS …``, JSON lists of arguments of ``fit``; prints the MiB of
each training after the first.
"""

import ctypes
import gc
import json
import sys

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_rlhf.cli.training import RLHFCLI
from tests.benchmarks.worker import peak, reset_peak, resident


class Peak(Callback):
    """Begins to count with the first batch: not what loading takes besides."""

    def __init__(self):
        self.found = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            for weights in pl_module.parameters():
                weights.detach().view(-1)[::512].sum()  # a page that nobody reads stays in its file
            collect()
            reset_peak()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found = peak()


class MeasuredCLI(RLHFCLI):
    """``fit``, measured."""

    def __init__(self, arguments):
        self.peak = Peak()
        super().__init__(["fit", *arguments])

    def instantiate_trainer(self, **settings):
        self.save_config_callback = None
        return super().instantiate_trainer(**settings)

    def before_fit(self):
        self.trainer.callbacks.append(self.peak)


def collect():
    """Give back what is not used."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(arguments):
    """The peak of a training in MiB, over what is resident now."""
    collect()
    before = resident()
    L.seed_everything(0)
    return MeasuredCLI(arguments).peak.found - before


if __name__ == "__main__":
    warm_up, *runs = map(json.loads, sys.argv[1:])
    MeasuredCLI(warm_up)  # of a tiny model: what is imported and kept at the first use
    for run in runs:
        print(f"\npeak {measure(run):.1f}")
