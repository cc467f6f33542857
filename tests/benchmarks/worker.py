"""A process for each competitor: it steps when it is told to, so that steps interleave and memory is its own."""

import contextlib
import gc
import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from lightning_rlhf.data.packing import PromptGroup
from tests.benchmarks.workload import Task

MIB = 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """Which competitor a process runs: ``ours``, ``bare``, ``apart`` or one of TRL's settings.

    Attributes:
        name: Of the competitor.
        task: What it computes.
        precision: Of the Trainer.
        threads: That it computes with.
        verbose: Show what it prints.
        num_prompts: Of PPO: prompts an iteration.
        num_epochs: Of PPO: passes over a rollout.
        folder: Of PPO: where ``base`` and ``reward``, an adapter on it, are.
        trl_ppo: Folder of the TRL that still has PPO.
    """

    name: str
    task: Task
    precision: str
    threads: int
    verbose: bool = False
    num_prompts: int = 0
    num_epochs: int = 0
    folder: str = ""
    trl_ppo: str = ""


@dataclass(frozen=True)
class Step:
    """One step of a competitor.

    Attributes:
        seconds: From the batch in hand to the weights updated.
        cpu_seconds: Of all threads in that time, waiting in a loop included: what a machine with other work can tell.
        loss: Summed over the batch.
        tokens: That the layers of policy (and reference) computed, padding included.
        baseline: Resident MiB before the first step, models built; of PPO, modules imported and no model built.
        peak: Most resident MiB in the steps so far.
        generation_share: Of the seconds, where a step samples and tells it.
    """

    seconds: float
    cpu_seconds: float
    loss: float
    tokens: int
    baseline: float
    peak: float
    generation_share: float | None = None


class Worker:
    """The parent's handle of a competitor's process."""

    def __init__(self, spec: Spec) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = spec.name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def step(self, groups: list[PromptGroup]) -> Step:
        """Let it do one step, while every other process sleeps."""
        self._connection.send(groups)
        return self._receive()

    def close(self) -> None:
        """End the process and give its memory back."""
        self._connection.close()
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Step:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: the process ended with {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}:\n{answer}")
        return answer


def _serve(connection: Connection, spec: Spec) -> None:
    if not spec.verbose:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    try:
        import torch

        torch.set_num_threads(spec.threads)
        from tests.benchmarks.competitors import ours_in_a_bare_loop, ours_in_a_trainer

        served = Served(connection)
        if spec.task in ("ppo_model", "ppo_adapter", "generation"):
            from tests.benchmarks.ppo_sides import run_side

            run_side(spec, served)
        elif spec.name in ("ours", "apart"):
            apart = spec.name == "apart"
            ours_in_a_trainer(spec.task, spec.precision, served.batch, served.done, apart=apart)
        elif spec.name == "bare":
            ours_in_a_bare_loop(spec.task, spec.precision, served.batch, served.done)
        else:
            from tests.benchmarks.trl_side import trl_step

            trl_step(spec.task, spec.precision, spec.name, served.batch, served.done)
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(traceback.format_exc())
        sys.exit(1)


class Served:
    """A competitor's end of the connection: hands out batches, and answers with steps."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.baseline: float | None = None
        self.ready = False
        self.started = self.cpu_started = 0.0

    def imported(self) -> None:
        """Count memory from here on, instead of from the first batch."""
        gc.collect()
        self.baseline = resident()

    def batch(self, collate: Callable[[list[PromptGroup]], T]) -> T:
        """The next batch, once the parent sends it; the clock starts when it is collated."""
        if not self.ready:
            self.ready = True
            reset_peak()
            self.baseline = self.baseline or resident()
            self.connection.send(Step(0.0, 0.0, 0.0, 0, self.baseline, self.baseline))
        try:
            batch = collate(self.connection.recv())
        except EOFError:
            os._exit(0)
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        return batch

    def done(self, report: tuple[float, int], generation_share: float | None = None) -> None:
        """Answer with the step just made."""
        seconds, cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        baseline = self.baseline or 0.0
        self.connection.send(Step(seconds, cpu_seconds, *report, baseline, peak(), generation_share))


def _status(field: str) -> float | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return float(line.split()[1]) / 1024
    return None


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident() -> float:
    """MiB of this process in memory now."""
    import psutil

    return psutil.Process().memory_info().rss / MIB


def peak() -> float:
    """Most MiB of this process in memory since the last reset, or since its start where that can't be reset."""
    found = _status("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
