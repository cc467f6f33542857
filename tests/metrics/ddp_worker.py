"""Two processes that share each metric's rows unevenly: ``ddp_worker.py FOLDER``. Run by test_ddp.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_rlhf.metrics import GoodhartGap
from tests.metrics.conftest import NAMES, batch, goodhart_rows, make, numbers

# Rank 1 has three updates, rank 0 one of another size; together they are rows 0 to 100.
PARTS = ([80], [1, 13, 7])


def goodhart(rank: int, shares: tuple[slice, slice]) -> list[dict[str, float]]:
    """The run with each evaluation's samples shared between the ranks, and with all of them on rank 0."""
    found = []
    for mine in (shares[rank], slice(None) if rank == 0 else None):
        metric = GoodhartGap()
        for step, *values in goodhart_rows() if mine is not None else []:
            metric.update(step, *(value[mine] for value in values))
        found.append(numbers(metric.compute()))
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name in NAMES:
        metric = make(name)
        mine = [tensor[:80] if rank == 0 else tensor[80:] for tensor in batch(name)]
        for part in zip(*(tensor.split(PARTS[rank]) for tensor in mine), strict=True):
            metric(*part)  # forward: what is merged is a batch's state, too
        results[name] = numbers(metric.compute())
        if name == "CalibrationError":
            results["curve"] = [part.tolist() for part in metric.curve()]
        # A rank that saw nothing changes nothing, and the states are this rank's own again.
        metric.reset()
        if rank == 0:
            metric.update(*batch(name))
        results[f"{name} on one rank"] = numbers(metric.compute())
    results["GoodhartGap"], results["GoodhartGap on one rank"] = goodhart(
        rank, (slice(0, 30), slice(30, None))
    )
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(sys.argv[1],), nprocs=2)
