"""Interleaved steps of competitors on the same batches, and what they amount to."""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_rlhf.data.packing import pack
from tests.benchmarks.ppo import run_ppo
from tests.benchmarks.trl_side import TRL_SETTINGS
from tests.benchmarks.worker import Spec, Step, Worker
from tests.benchmarks.workload import Task, Workload, load, model_flops, ranked

MATMUL_SIZE = 2_048
PRECISIONS: dict[Task, list[str]] = {
    "dpo": ["32-true", "bf16-mixed"],
    "sft": ["32-true"],
    "reward": ["32-true"],
    "kto": ["32-true"],
}
SAME_WORK = {"32-true": 1e-3, "bf16-mixed": 2e-2}
"""How far losses may differ, relatively: the second step's already depends on the first one's gradient."""
RANKED_SIZES, RANKED_BATCH_SIZE = (4, 8), 2


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        assets: Folder of the real data.
        steps: Measured steps a competitor, after one to warm up.
        threads: Of every process, one of which computes at a time.
        verbose: Show what the competitors print.
        quick: Take the first of TRL's settings, instead of trying which is fastest.
        ppo_steps: Measured iterations of PPO, after one to warm up.
        num_prompts: Of an iteration of PPO.
        trl_ppo: Folder of the TRL that still has PPO; None leaves PPO out.
        setting: TRL's setting, instead of trying which is fastest.
    """

    assets: Path
    steps: int
    threads: int
    verbose: bool
    quick: bool
    ppo_steps: int = 1
    num_prompts: int = 32
    trl_ppo: Path | None = None
    setting: str | None = None


Result = dict[str, Any]


def run(
    settings: Settings, only: str | None, precision: str | None, roles: str | None = None
) -> list[Result]:
    """Every part, or one."""
    results = []
    for task in PRECISIONS:
        if only in (None, task):
            workload = load(task, settings.assets, settings.steps + 1)
            for each in PRECISIONS[task]:
                if precision in (None, each):
                    results.append(compare(settings, workload, each))
    if only in (None, "ranked"):
        pairs = load("reward", settings.assets, settings.steps + 1)
        results += [rank(settings, ranked(pairs, size, RANKED_BATCH_SIZE)) for size in RANKED_SIZES]
    if only in (None, "overhead"):
        results.append(overhead(settings, load("dpo", settings.assets, 2 * settings.steps + 1)))
    if only == "ppo" or (only is None and settings.trl_ppo is not None):
        results += run_ppo(settings, roles)
    return results


def compare(settings: Settings, workload: Workload, precision: str) -> Result:
    """Our step beside TRL's in the setting in which TRL is fastest."""
    best, tried = _best_setting(settings, workload, precision)
    matmul = Matmul(settings.threads)
    ours, theirs = _start(settings, workload, precision, "ours"), _start(settings, workload, precision, best)
    steps = _interleave(f"{workload.task} {precision}", workload, [ours, theirs], matmul)
    _assert_same_work(steps, SAME_WORK[precision])
    a, b = steps["ours"][1:], steps[best][1:]
    flops = [model_flops(pack(groups), workload.task) for groups in workload.batches[1:]]
    shares = [f / s.seconds / m for f, s, m in zip(flops, a, matmul.rates[1:], strict=True)]
    return {
        "task": workload.task,
        "precision": precision,
        "trl_setting": best,
        "trl_settings_tried": tried,
        "speed_ratio": _median(y.seconds / x.seconds for x, y in zip(a, b, strict=True)),
        "cpu_ratio": _median(y.cpu_seconds / x.cpu_seconds for x, y in zip(a, b, strict=True)),
        "token_ratio": sum(y.tokens for y in b) / sum(x.tokens for x in a),
        "matmul_share": _median(shares),
        "matmul_flops": statistics.median(matmul.rates),
        "largest_loss_difference": _largest_difference(steps),
        "ours": _summary(a),
        "trl": _summary(b),
    }


def overhead(settings: Settings, workload: Workload) -> Result:
    """Our step in a Trainer beside the same forward, loss, backward and optimizer in a bare loop."""
    workers = [_start(settings, workload, "32-true", name) for name in ("ours", "bare")]
    steps = _interleave("overhead", workload, workers)
    a, b = steps["ours"][1:], steps["bare"][1:]
    return {
        "task": "overhead",
        "overhead": _median(x.seconds / y.seconds for x, y in zip(a, b, strict=True)) - 1,
        "overhead_of_fastest": min(x.seconds / x.tokens for x in a) / min(y.seconds / y.tokens for y in b)
        - 1,
        "ours": _summary(a),
        "bare": _summary(b),
    }


def rank(settings: Settings, workload: Workload) -> Result:
    """Ranked groups beside all their pairs apart, in the same module and Trainer."""
    workers = [_start(settings, workload, "32-true", name) for name in ("ours", "apart")]
    size = len(workload.batches[0][0].completions)
    steps = _interleave(f"ranked, {size} completions", workload, workers)
    _assert_same_work(steps, SAME_WORK["32-true"])
    a, b = steps["ours"][1:], steps["apart"][1:]
    return {
        "task": "ranked",
        "num_completions": size,
        "num_prompts": len(workload.batches[0]),
        "cost": _median(x.seconds / y.seconds for x, y in zip(a, b, strict=True)),
        "cpu_ratio": _median(y.cpu_seconds / x.cpu_seconds for x, y in zip(a, b, strict=True)),
        "token_ratio": sum(y.tokens for y in b) / sum(x.tokens for x in a),
        "largest_loss_difference": _largest_difference(steps),
        "ours": _summary(a),
        "apart": _summary(b),
    }


def _best_setting(settings: Settings, workload: Workload, precision: str) -> tuple[str, dict[str, Any]]:
    """Two steps of each of TRL's settings, one after the other; the second counts."""
    tried: dict[str, Any] = {}
    if settings.setting is not None:
        return settings.setting, tried
    if settings.quick:
        return next(iter(TRL_SETTINGS[workload.task])), tried
    sizes = [sum(len(g.prompt) for g in batch) for batch in workload.batches]
    typical = workload.batches[sizes.index(statistics.median_low(sizes))]
    for name in TRL_SETTINGS[workload.task]:
        worker = _start(settings, workload, precision, name)
        try:
            worker.step(typical)
            tried[name] = worker.step(typical).seconds
        except RuntimeError as problem:
            tried[name] = str(problem).strip().splitlines()[-1]
        finally:
            worker.close()
        _say(f"{workload.task} {precision}: TRL, {name}: {tried[name]}")
    timed = {name: value for name, value in tried.items() if isinstance(value, float)}
    return min(timed, key=lambda name: timed[name]), tried


def _start(settings: Settings, workload: Workload, precision: str, name: str) -> Worker:
    return Worker(Spec(name, workload.task, precision, settings.threads, settings.verbose))


def _interleave(
    title: str, workload: Workload, workers: list[Worker], matmul: "Matmul | None" = None
) -> dict[str, list[Step]]:
    """Every batch by every worker in turn, the order changing; the first step warms up."""
    steps: dict[str, list[Step]] = {worker.name: [] for worker in workers}
    try:
        for at, batch in enumerate(workload.batches):
            for worker in workers if at % 2 else workers[::-1]:
                if matmul is not None and worker.name == "ours":
                    matmul.measure()
                steps[worker.name].append(worker.step(batch))
            last = {name: done[-1] for name, done in steps.items()}
            seconds = ", ".join(
                f"{name} {s.seconds:.2f} s (CPU {s.cpu_seconds:.2f} s)" for name, s in last.items()
            )
            _say(f"{title}, batch {at} of {len(workload.batches) - 1}: {seconds}")
    finally:
        for worker in workers:
            worker.close()
    return steps


def _largest_difference(steps: dict[str, list[Step]]) -> float:
    """Of the losses of two competitors, relatively, over all steps."""
    ours, theirs = steps.values()
    return max(abs(x.loss - y.loss) / abs(y.loss) for x, y in zip(ours, theirs, strict=True))


def _assert_same_work(steps: dict[str, list[Step]], tolerance: float) -> None:
    """Refuse to compare times where the losses differ, in the first step or later."""
    difference = _largest_difference(steps)
    if not difference <= tolerance:
        losses = {name: [step.loss for step in done] for name, done in steps.items()}
        raise RuntimeError(
            f"not the same work: losses differ by {difference:.2g} (allowed {tolerance}): {losses}"
        )


class Matmul:
    """FLOPs a second of a large float32 matrix product, measured beside the steps."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.rates: list[float] = []
        self._a, self._b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE) for _ in range(2))
        for _ in range(3):
            self._a @ self._b

    def measure(self) -> None:
        """The median of five products."""
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            self._a @ self._b
            seconds.append(time.perf_counter() - start)
        self.rates.append(2 * MATMUL_SIZE**3 / statistics.median(seconds))


def _median(values: Any) -> float:
    return statistics.median(list(values))


def _summary(steps: list[Step]) -> Result:
    return {
        "seconds": [round(step.seconds, 4) for step in steps],
        "cpu_seconds": [round(step.cpu_seconds, 4) for step in steps],
        "median_seconds": statistics.median(step.seconds for step in steps),
        "tokens": [step.tokens for step in steps],
        "tokens_per_step": statistics.mean(step.tokens for step in steps),
        "peak_mib": max(step.peak for step in steps),
        "peak_above_baseline_mib": max(step.peak - step.baseline for step in steps),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
