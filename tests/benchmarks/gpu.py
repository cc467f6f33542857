"""QLoRA beside TRL on a GPU: ``python -m tests.benchmarks.gpu [--shape 8b] [--only dpo …] [--json PATH]``.

Every side runs in a process of its own, one after the other. Prints a Markdown table. With ``--device cpu --shape
tiny`` the same runs without a GPU, to see that it runs.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning_rlhf.data.packing import PromptGroup, pack
from tests.benchmarks.gpu_models import SHAPES, config_of, flops
from tests.benchmarks.gpu_sides import Spec, batches

TASKS = ["sft", "dpo", "reward", "kto", "ppo"]
TITLES = {"sft": "SFT", "dpo": "DPO", "reward": "RewardModel", "kto": "KTO", "ppo": "PPO, four roles"}
REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "lightning", "trl"]
HEADER = (
    "QLoRA",
    "seconds a step, ours / TRL",
    "faster",
    "tokens a step",
    "tokens a second, ours",
    "peak, GiB",
    "of a matrix product's rate",
    "generation",
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a Markdown table, and write the numbers."""
    options = _parser().parse_args(arguments)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device; --device cpu --shape tiny shows that the script runs")
        return 0
    assets = os.environ.get("LIGHTNING_RLHF_ASSETS") or str(REPOSITORY.parent / "shared" / "assets")
    if options.lengths != "hh_helpful":
        assets = ""
    elif not Path(assets).is_dir():
        print("skipped: the lengths of hh_helpful are real data (LIGHTNING_RLHF_ASSETS), and it is absent")
        return 0
    prompt, _, completion = options.lengths.partition("+")
    spec = Spec(
        side="ours",
        task="",
        shape=options.shape,
        device=options.device,
        steps=options.steps,
        batch_size=options.batch_size,
        prompt=int(prompt) if not assets else 0,
        completion=int(completion) if not assets else options.new_tokens,
        assets=assets,
        cap=options.cap,
        checkpointing={"true": True, "false": False}.get(options.checkpointing, options.checkpointing),
        compile=options.compile,
        num_epochs=options.epochs,
        trl_ppo=str(options.trl_ppo or ""),
    )
    rate = matmul_rate(options.device, 8_192 if options.device == "cuda" else 512)
    results = [compare(replace(spec, task=task), rate, ours_only=options.ours_only) for task in options.only]
    report = {"machine": _machine(options.device, rate), "settings": asdict(spec), "results": results}
    print(markdown(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--lengths", default="512+512", help="PROMPT+COMPLETION in tokens, or hh_helpful")
    parser.add_argument("--new-tokens", type=int, default=128, help="of PPO at the lengths of hh_helpful")
    parser.add_argument("--batch-size", type=int, default=4, help="prompts a step")
    parser.add_argument("--steps", type=int, default=5, help="measured, after one to warm up")
    parser.add_argument("--epochs", type=int, default=1, help="of PPO")
    parser.add_argument("--cap", type=float, default=0.0, metavar="GIB", help="of the GPU's memory")
    parser.add_argument("--checkpointing", choices=["true", "false", "selective"], default="true")
    parser.add_argument("--compile", action="store_true", help="torch.compile of our decoder layers")
    parser.add_argument("--trl-ppo", type=Path, metavar="FOLDER", default=os.environ.get("TRL_PPO"))
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write every number")
    return parser


def compare(spec: Spec, rate: float, *, ours_only: bool) -> dict[str, Any]:
    """Both sides of a task, or ours where there is no other."""
    made = batches(spec)[1:]
    needed = [flops(spec.shape, pack(_answered(groups, spec)), spec.task, spec.num_epochs) for groups in made]
    sides = {"ours": run(spec)}
    has_trl = bool(spec.trl_ppo) if spec.task == "ppo" else importlib.util.find_spec("trl") is not None
    if has_trl and not ours_only:
        sides["trl"] = run(replace(spec, side="trl"))
    for found in sides.values():
        if "seconds" in found:
            found["median_seconds"] = statistics.median(found["seconds"])
            found["tokens_per_second"] = sum(found["tokens"]) / sum(found["seconds"])
            found["matmul_share"] = statistics.median(
                flop / seconds / rate for flop, seconds in zip(needed, found["seconds"], strict=True)
            )
    return {"task": spec.task, **sides}


def _answered(groups: list[PromptGroup], spec: Spec) -> list[PromptGroup]:
    """Of PPO, as long as the samples will be."""
    if spec.task != "ppo":
        return groups
    return [PromptGroup(group.prompt, [[5] * spec.completion], row_id=group.row_id) for group in groups]


def run(spec: Spec) -> dict[str, Any]:
    """A side in a process of its own."""
    print(f"{spec.task}, {spec.side} …", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "tests.benchmarks.gpu_sides", json.dumps(asdict(spec))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{spec.task}, {spec.side}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def matmul_rate(device: str, size: int) -> float:
    """FLOPs a second of a large product in bfloat16: the median of ten."""
    import torch

    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        began = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[3:])


def _machine(device: str, rate: float) -> dict[str, Any]:
    import torch

    versions = {}
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "matmul_flops": rate,
    }


def markdown(report: dict[str, Any]) -> str:
    """A row a task, and what it was measured on."""
    machine, settings = report["machine"], report["settings"]
    lines = [HEADER, tuple("---" for _ in HEADER), *map(_row, report["results"])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    lengths = "of hh_helpful" if settings["assets"] else f"{settings['prompt']} + {settings['completion']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    family, shape, rows = config_of(settings["shape"]).model_type, settings["shape"], settings["batch_size"]
    return (
        f"{table}\n\n{machine['name']}, {machine['date']}; {versions}. A {shape} {family} of random weights in nf4, "
        f"LoRA of rank 16 on all linear layers, paged 8-bit AdamW; {rows} prompts a step, tokens {lengths}; gradient "
        f"checkpointing {settings['checkpointing']}"
        + ("; our layers compiled" if settings["compile"] else "")
        + (f"; at most {settings['cap']:g} GiB" if settings["cap"] else "")
        + f". A matrix product in bfloat16: {machine['matmul_flops'] / 1e12:,.1f} TFLOP/s. Where a cell has two "
        "numbers, ours comes first; model FLOPs are the same for both sides, recomputation not counted."
    )


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    sides = [result[name] for name in ("ours", "trl") if name in result]

    def both(key: str, form: str) -> str:
        return " / ".join("out of memory" if key not in s else format(s[key], form) for s in sides)

    fits = all("seconds" in side for side in sides)
    faster = sides[1]["median_seconds"] / sides[0]["median_seconds"] if len(sides) == 2 and fits else None
    tokens = " / ".join(f"{statistics.mean(s['tokens']):,.0f}" if "tokens" in s else "–" for s in sides)
    shares = result["ours"].get("generation_shares", [])
    return (
        TITLES[result["task"]],
        both("median_seconds", ".3f"),
        "–" if faster is None else f"{faster:.2f}×",
        tokens,
        f"{result['ours'].get('tokens_per_second', 0):,.0f}",
        both("peak_gib", ".2f"),
        both("matmul_share", ".1%"),
        f"{statistics.median(shares):.0%}" if result["task"] == "ppo" and shares else "–",
    )


if __name__ == "__main__":
    sys.exit(main())
