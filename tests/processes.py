"""Processes that tests start: forked from one that has imported everything, or fresh as a user starts them."""

import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_start_method, set_forkserver_preload, set_start_method
from pathlib import Path

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch.multiprocessing import start_processes

ROOT = Path(__file__).parents[1]
# Importing these takes several times as long as what a test computes. Not the package itself: the server does not
# know the path that pytest imports it from.
set_forkserver_preload(
    [
        "lightning.pytorch",
        "transformers.models.llama.modeling_llama",
        "peft",
        "datasets",
        "torchmetrics",
        "bitsandbytes",
    ]
)


def fork(function, *arguments, world=1, threads=1, seconds=300):
    """The function in a process of its own, or in every one of a group as torchrun starts it: what they printed.

    It is importable, and so are its arguments. On the CPU: importing may have initialised CUDA before the fork. Raises
    what ``torch.multiprocessing`` does where one fails or is killed.
    """
    with tempfile.NamedTemporaryFile("r") as printed:
        given = (printed.name, world, find_free_network_port(), threads, get_start_method())
        group = start_processes(
            _work, (*given, function, arguments), nprocs=world, join=False, start_method="forkserver"
        )
        end = time.monotonic() + seconds
        try:
            while not group.join(timeout=1, grace_period=1):
                assert time.monotonic() < end, f"not done after {seconds} s"
        finally:
            for process in group.processes:
                process.kill()  # Lightning catches SIGTERM
            text = printed.read()
            print(text)
    return text


def _work(rank, printed, world, port, threads, start_method, function, arguments):
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(threads)
    set_start_method(start_method, force=True)  # of a DataLoader's workers
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
        os.environ.update({name: str(value) for name, value in {**ranks, **place}.items()})
    function(*arguments)


def run_module(*words, seconds, cwd=ROOT):
    """What ``python -m`` these words reports, under ``timeout -k``: a hang of two processes does not end on SIGTERM."""
    done = subprocess.run(
        ["timeout", "-k", "5", str(seconds), sys.executable, "-m", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr
