"""How near a reward model comes to the best accuracy: ``python -m tests.benchmarks.ceiling [--seed 1]``.

A deeper model than the quickstart's, and two trainings of it: a drill on short answers, half of which have a slip, and
then rankings of answers as they are compared elsewhere, with more slips among them. What a slip looks like is hardly
learnt from long answers: a token that is wrong somewhere is a thirtieth of what the score sees, and the annotators'
noise is louder. Judged on 3,000 held-out pairs. Interrupted, it goes on when the same command is given again.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from lightning_rlhf.cli.plan import POLICY, REWARD_TRAIN, RM, SANDBOX, SFT, TRAIN, Plan, Rankings
from lightning_rlhf.cli.quickstart import carry_out
from lightning_rlhf.sandbox.writing import Style, contestant


def brief(rng: Random) -> Style:
    """A writer of short answers, every other one with a slip."""
    return Style(
        coverage=rng.uniform(0.1, 0.6),
        drift=rng.uniform(0.0, 0.3),
        bullets=0.35,
        flattery=0.1,
        filler=0.1,
        slip=0.5,
    )


def careless(rng: Random) -> Style:
    """The writer of answers to compare, with three times the slips."""
    return replace(contestant(rng), slip=0.45)


DRILL_TRAIN = "drill_train.jsonl"
ON_EIGHT = {"data.init_args.batch_size": 8, "model.init_args.optimization.warmup_ratio": 0.02}
CONSTANT = {"model.init_args.optimization.schedule": "constant_with_warmup"}
DRILL = replace(
    RM.but({TRAIN: f"{SANDBOX}/{DRILL_TRAIN}", **ON_EIGHT, **CONSTANT}), title="Drill", checkpoint_steps=250
)
PLAN = Plan(
    stages=(
        SFT.but({"trainer.max_epochs": 1, "data.init_args.batch_size": 32}),
        DRILL,
        RM.but({POLICY: "${drill}", **ON_EIGHT}),
    ),
    num_demonstrations=30_000,
    num_pairs=0,
    rankings={DRILL_TRAIN: Rankings(20_000, 8, brief), REWARD_TRAIN: Rankings(28_000, 8, careless)},
    num_layers=4,
)


def main() -> None:
    """Train what is not trained yet; the quickstart's report has the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ceiling", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("ceiling"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of every stage's process
    carry_out(PLAN, options.output, options.seed, overwrite=False)


if __name__ == "__main__":
    main()
