"""PPO beside TRL's, with roles as models and as adapters, and sampling beside bare ``generate``."""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning_rlhf.data.packing import PromptGroup
from tests.benchmarks.ppo_sides import NEW_TOKENS, PPO_SETTINGS
from tests.benchmarks.worker import Spec, Step, Worker
from tests.benchmarks.workload import Task, llama, load_prompts, score_weights

NUM_EPOCHS = 4
ROLES: dict[str, Task] = {"model": "ppo_model", "adapter": "ppo_adapter", "generation": "generation"}

Result = dict[str, Any]
Batches = list[list[PromptGroup]]


def run_ppo(settings: Any, roles: str | None) -> list[Result]:
    """All three, or one: roles as models, roles as adapters, sampling alone.

    Args:
        settings: Of :mod:`tests.benchmarks.measure`.
        roles: Which one; None for all.
    """
    batches = load_prompts(settings.assets, settings.ppo_steps + 1, settings.num_prompts)
    found = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for name, task in ROLES.items():
            if roles not in (None, name):
                continue
            if task == "generation":
                found.append(_sampling(settings, batches))
            else:
                if task == "ppo_adapter":
                    write_roles(Path(folder))
                found.append(_beside_trl(settings, batches, task, folder))
    return found


def write_roles(folder: Path) -> None:
    """Write the base, and a reward model's adapter on it."""
    import torch

    from lightning_rlhf.models import LoRA, Policy, load_language_model
    from lightning_rlhf.models.export import save_model
    from lightning_rlhf.models.loading import lora_config
    from lightning_rlhf.models.reward_directory import classifier_adapter
    from lightning_rlhf.models.scorer import ScoreHead
    from tests.tokenizers import letters

    base = folder / "base"
    for saved in (llama(), letters()):
        saved.save_pretrained(base)
    torch.manual_seed(1)
    model = load_language_model(Policy(str(base), lora=LoRA()))
    weights = {n: torch.randn_like(p) / 100 for n, p in model.model.named_parameters() if ".lora_" in n}
    head = ScoreHead(score_weights().shape[1])
    head.weight.data.copy_(score_weights())
    save_model(
        classifier_adapter(model.config, lora_config(LoRA()), str(base), weights, head), folder / "reward"
    )


def _beside_trl(settings: Any, batches: Batches, task: Task, folder: str) -> Result:
    best, tried = _best_setting(settings, batches, task)
    names = ("ours", best)
    workers = [Worker(_spec(settings, name, task, NUM_EPOCHS, folder)) for name in names]
    steps = _interleave(task, batches, workers)
    ours, theirs = (steps[name][1:] for name in names)
    return {
        "task": task,
        "trl_setting": best,
        "trl_settings_tried": tried,
        **_ratios(ours, theirs, settings.num_prompts),
        "memory_ratio": _above(steps["ours"]) / _above(steps[best]),
        "generation_share": statistics.median(step.generation_share or 0.0 for step in ours),
        "ours": _summary(steps["ours"], settings.num_prompts),
        "trl": _summary(steps[best], settings.num_prompts),
    }


def _sampling(settings: Any, batches: Batches) -> Result:
    names = ("ours", "bare")
    workers = [Worker(_spec(settings, name, "generation", 0, "")) for name in names]
    steps = _interleave("generation", batches, workers)
    assert all(step.tokens == settings.num_prompts * NEW_TOKENS for done in steps.values() for step in done)
    return {
        "task": "generation",
        **_ratios(steps["ours"][1:], steps["bare"][1:], settings.num_prompts),
        "ours": _summary(steps["ours"], settings.num_prompts),
        "bare": _summary(steps["bare"], settings.num_prompts),
    }


def _best_setting(settings: Any, batches: Batches, task: Task) -> tuple[str, dict[str, Any]]:
    """One iteration with a single epoch of each of TRL's settings: too long for more."""
    if settings.setting is not None:
        return settings.setting, {}
    if settings.quick:
        return PPO_SETTINGS[0], {}
    tried: dict[str, Any] = {}
    for name in PPO_SETTINGS:
        worker = Worker(_spec(settings, name, task, 1, ""))
        try:
            tried[name] = worker.step(batches[0]).cpu_seconds
        except RuntimeError as problem:
            tried[name] = str(problem).strip().splitlines()[-1]
        finally:
            worker.close()
        _say(f"{task}: TRL, {name}: {tried[name]}")
    timed = {name: value for name, value in tried.items() if isinstance(value, float)}
    return min(timed, key=lambda name: timed[name]), tried


def _spec(settings: Any, name: str, task: Task, num_epochs: int, folder: str) -> Spec:
    return Spec(
        name,
        task,
        "32-true",
        settings.threads,
        settings.verbose,
        settings.num_prompts,
        num_epochs,
        folder,
        str(settings.trl_ppo),
    )


def _interleave(title: str, batches: Batches, workers: list[Worker]) -> dict[str, list[Step]]:
    """Every batch by both in turn, the order changing; the first one warms up."""
    steps: dict[str, list[Step]] = {worker.name: [] for worker in workers}
    try:
        for at, batch in enumerate(batches):
            for worker in workers if at % 2 else workers[::-1]:
                steps[worker.name].append(worker.step(batch))
                last = steps[worker.name][-1]
                _say(
                    f"{title}, batch {at} of {len(batches) - 1}: {worker.name} {last.seconds:.1f} s, "
                    f"{last.cpu_seconds:.1f} s of the processor, {last.peak - last.baseline:,.0f} MiB"
                )
    finally:
        for worker in workers:
            worker.close()
    return steps


def _ratios(ours: list[Step], theirs: list[Step], num_prompts: int) -> Result:
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "num_prompts": num_prompts,
        "speed_ratio": statistics.median(y.seconds / x.seconds for x, y in pairs),
        "cpu_ratio": statistics.median(y.cpu_seconds / x.cpu_seconds for x, y in pairs),
    }


def _above(steps: list[Step]) -> float:
    return max(step.peak - step.baseline for step in steps)


def _summary(steps: list[Step], num_prompts: int) -> Result:
    measured = steps[1:]
    seconds = statistics.median(step.seconds for step in measured)
    return {
        "seconds": [round(step.seconds, 4) for step in measured],
        "cpu_seconds": [round(step.cpu_seconds, 4) for step in measured],
        "median_seconds": seconds,
        "samples_per_second": num_prompts / seconds,
        "tokens_per_second": measured[0].tokens / seconds,
        "generation_shares": [step.generation_share for step in measured],
        "baseline_mib": steps[0].baseline,
        "peak_above_imports_mib": _above(steps),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
