"""Two processes that share each metric's rows unevenly. Used by test_ddp."""

import json
from pathlib import Path

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


def work(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
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
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
