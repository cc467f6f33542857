"""What ``torch.compile`` of decoder layers is worth on a CPU: ``python -m tests.benchmarks.compiled [--batches N]``.

The same DPO steps with and without it, batch by batch, by processor time; the first batch has the compilation in it.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface

from lightning_rlhf.data.packing import PackedBatch, pack
from lightning_rlhf.models import attention
from tests.benchmarks.competitors import adamw, bare_step, module_of
from tests.benchmarks.workload import load


class Side:
    """A model, a reference and an optimizer.

    Args:
        compiled: Compile every decoder layer, for any length; the attention of a packed row stays as it is.
    """

    def __init__(self, *, compiled: bool) -> None:
        self.module = module_of("dpo")
        self.module.configure_model()
        models: set[nn.Module] = {self.module.policy, *self.module.reference.language_models}
        for model in models:
            for layer in model.causal_lm.get_decoder().layers if compiled else ():
                layer.compile(dynamic=True)
        self.optimizer = adamw(self.module.policy)

    def step(self, batch: PackedBatch) -> tuple[float, float]:
        """Loss, and seconds of the processor."""
        began = time.process_time()
        loss = bare_step(self.module, self.optimizer, "dpo", "32-true", batch)
        return loss, time.process_time() - began


def main() -> int:
    """Print a row a batch, and the median of all but the first."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compiled", description=__doc__)
    parser.add_argument("--batches", type=int, default=8, help="batches of real pairs")
    parser.add_argument("--assets", type=Path, default=os.environ.get("LIGHTNING_RLHF_ASSETS"))
    options = parser.parse_args()
    if options.assets is None:
        parser.error("--assets or LIGHTNING_RLHF_ASSETS must name the folder of real data")
    torch.set_num_threads(1)
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.shared_prefix_attention))
    batches = [pack(groups) for groups in load("dpo", options.assets, options.batches).batches]
    sides = {"eager": Side(compiled=False), "compiled": Side(compiled=True)}
    print(
        "| batch | tokens | eager, s | compiled, s | eager / compiled |\n|---|---:|---:|---:|---:|",
        flush=True,
    )
    ratios = []
    for place, batch in enumerate(batches):
        order = ("eager", "compiled") if place % 2 else ("compiled", "eager")
        found = {name: sides[name].step(batch) for name in order}
        (loss, eager), (other, compiled) = found["eager"], found["compiled"]
        if abs(loss - other) > 1e-4 * abs(loss):
            raise RuntimeError(f"batch {place}: the loss is {loss} without compilation and {other} with it")
        ratios.append(eager / compiled)
        tokens = len(batch.input_ids)
        print(f"| {place} | {tokens:,} | {eager:.1f} | {compiled:.1f} | {ratios[-1]:.2f} |", flush=True)
    if len(ratios) > 1:
        print(f"\nmedian without the first: {statistics.median(ratios[1:]):.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
