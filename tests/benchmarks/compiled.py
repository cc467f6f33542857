"""What ``torch.compile`` of decoder layers is worth on a CPU: ``python -m tests.benchmarks.compiled [--batches N]``.

The same DPO steps with and without it, batch by batch, by processor time. The first batch has the compilation in
it, but for what PyTorch finds in its cache of an earlier run.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from lightning_rlhf.data.packing import PackedBatch, pack
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.models.loading import prepare
from tests.benchmarks.competitors import adamw, bare_step, llama, module_of
from tests.benchmarks.workload import load


class Side:
    """A model, a reference and an optimizer.

    Args:
        compiled: Whether its layers are.
        lora: Train an adapter, whose base is the reference.
        precision: As of a Trainer.
    """

    def __init__(self, *, compiled: bool, lora: bool, precision: str) -> None:
        torch.manual_seed(0)
        settings = Policy("random", lora=LoRA() if lora else None, compile=compiled)
        self.module = module_of("dpo", prepare(llama(), settings))
        self.optimizer = adamw(self.module.policy)
        self.precision = precision

    def step(self, batch: PackedBatch) -> tuple[float, float]:
        """Loss, and seconds of the processor."""
        began = time.process_time()
        loss = bare_step(self.module, self.optimizer, "dpo", self.precision, batch)
        return loss, time.process_time() - began


def main() -> int:
    """Print a row a batch, and the median of all but the first."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compiled", description=__doc__)
    parser.add_argument("--batches", type=int, default=8, help="batches of real pairs")
    parser.add_argument("--rows", type=int, default=8, help="pairs of a batch, at most 8")
    parser.add_argument("--lora", action="store_true", help="train an adapter")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--assets", type=Path, default=os.environ.get("LIGHTNING_RLHF_ASSETS"))
    options = parser.parse_args()
    if options.assets is None:
        parser.error("--assets or LIGHTNING_RLHF_ASSETS must name the folder of real data")
    torch.set_num_threads(1)
    batches = [
        pack(groups[: options.rows]) for groups in load("dpo", options.assets, options.batches).batches
    ]
    how = {"lora": options.lora, "precision": options.precision}
    sides = {"eager": Side(compiled=False, **how), "compiled": Side(compiled=True, **how)}
    print(
        "| batch | tokens | eager, s | compiled, s | eager / compiled |\n|---|---:|---:|---:|---:|",
        flush=True,
    )
    ratios = []
    for place, batch in enumerate(batches):
        order = ("eager", "compiled") if place % 2 else ("compiled", "eager")
        found = {name: sides[name].step(batch) for name in order}
        (loss, eager), (other, compiled) = found["eager"], found["compiled"]
        if abs(loss - other) > (1e-4 if options.precision == "32-true" else 1e-2) * abs(loss):
            raise RuntimeError(f"batch {place}: the loss is {loss} without compilation and {other} with it")
        ratios.append(eager / compiled)
        tokens = len(batch.input_ids)
        print(f"| {place} | {tokens:,} | {eager:.1f} | {compiled:.1f} | {ratios[-1]:.2f} |", flush=True)
    if len(ratios) > 1:
        print(f"\nmedian without the first: {statistics.median(ratios[1:]):.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
