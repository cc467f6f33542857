"""Two processes that share the samples of each batch unevenly. Used by test_combined."""

import json

import torch
import torch.distributed as dist

from lightning_rlhf.rewards import LengthResidual, Normalized
from tests.rewards.conftest import samples_of

FIRST = 3  # samples of rank 0; the others are rank 1's


def shapers():
    return [Normalized(), LengthResidual()]


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, generator=generator) * 4 + 7, samples_of(8)) for _ in range(3)]


def work(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = range(FIRST) if rank == 0 else range(FIRST, 8)
    ours = shapers()
    values = [
        [shaper(batch[list(mine)], samples.select(mine)).tolist() for shaper in ours]
        for batch, samples in batches()
    ]
    state = [shaper.get_extra_state() for shaper in ours]
    (folder / f"rank{rank}.json").write_text(json.dumps({"values": values, "state": state}))
    dist.destroy_process_group()
