"""The preference family on the sandbox: ``python -m tests.benchmarks.family [--seeds 1 2 3] [--output FOLDER]``.

For every seed: a world, an SFT model, and from it one policy a method on the same 3,400 pairs, as the quickstart
trains them. Prints a Markdown table. Interrupted, it goes on when the same command is given again.
"""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lightning_rlhf.cli.measure import standard_error
from lightning_rlhf.cli.plan import DPO, KTO, SFT, Plan, Stage
from lightning_rlhf.cli.quickstart import carry_out

HEADER = (
    "method",
    "learning rate",
    "gold reward",
    "gain over SFT",
    "KL from SFT (nats)",
    "length",
    "malformed",
    "cut off",
)


def method(recipe: Stage, title: str, lr: float, settings: Mapping[str, Any]) -> Stage:
    """A stage of the quickstart by another name, learning rate and objective."""
    overrides = {"model.init_args.optimization.lr": lr, **settings}
    return replace(recipe.but(overrides), title=title, metric="train/loss")


def by(objective: str, **settings: float) -> dict[str, Any]:
    """Preference optimisation with an objective."""
    return {"model.init_args.objective": {"class_path": objective, "init_args": settings}}


METHODS: dict[str, Stage] = {
    "DPO, β = 0.1": method(DPO, "DPO", 1e-4, by("Sigmoid", beta=0.1)),
    "IPO, β = 1": method(DPO, "IPO", 1e-4, by("IPO", beta=1.0)),
    "KTO, β = 0.1": method(KTO, "KTO", 1e-4, {"model.init_args.beta": 0.1}),
    "ORPO, β = 2": method(DPO, "ORPO", 5e-4, by("ORPO", beta=2.0)),
    "SimPO, β = 2, γ = 0.5": method(DPO, "SimPO", 1e-4, by("SimPO", beta=2.0, gamma=0.5)),
}
"""What was tuned (learning rate, β) was tuned on seed 0, which is not among the reported ones."""
PLAN = Plan(stages=(SFT, *METHODS.values()), rankings={}, num_reward_test=0)
RATES = (3e-3, *(stage.overrides["model.init_args.optimization.lr"] for stage in METHODS.values()))


def table(reports: list[list[dict[str, Any]]]) -> str:
    """The Markdown table of the quickstart reports of several seeds."""
    names = ["SFT", *METHODS]
    lines = [HEADER, ("---",) + ("---:",) * (len(HEADER) - 1)]
    for place, (name, rate) in enumerate(zip(names, RATES, strict=True)):
        rows = [report[place] for report in reports]
        gains = [row["gold"] - report[0]["gold"] for row, report in zip(rows, reports, strict=True)]
        lines.append(
            (
                name,
                f"{rate:.0e}",
                over_seeds([row["gold"] for row in rows]),
                over_seeds(gains) if place else "",
                over_seeds([row["divergence"]["kl"] for row in rows]),
                over_seeds([row["mean_length"] for row in rows], digits=1),
                over_seeds([row["malformed"] for row in rows], percent=True),
                over_seeds([row["truncated"] for row in rows], percent=True),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def over_seeds(values: list[float], *, digits: int = 2, percent: bool = False) -> str:
    """Mean and standard error over seeds."""
    scale, unit, digits = (100, "%", 1) if percent else (1, "", digits)
    error = f" ± {standard_error(values) * scale:.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values) * scale:.{digits}f}{error}{unit}"


def main() -> None:
    """Train what is not trained yet, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.family", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("family"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    reports = []
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of every stage's process
    for seed in options.seeds:
        folder = options.output / f"seed_{seed}"
        if not (folder / "report").is_dir():
            carry_out(PLAN, folder, seed, overwrite=False)
        reports.append(json.loads((folder / "report" / "table.json").read_text())["stages"])
    print(table(reports))


if __name__ == "__main__":
    main()
