"""How near a reward model comes to the best accuracy: ``python -m tests.benchmarks.ceiling [--seed 1]``.

A deeper model than the quickstart's, more and longer rankings with twice the slips, and a token head, by which a slip
is seen where it stands. Trained in two stages, the second on new rankings at a lower rate. Judged on 3,000 held-out
pairs as they are compared elsewhere. Interrupted, it goes on when the same command is given again.
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


def careless(rng: Random) -> Style:
    """The writer of answers to compare, with twice the slips."""
    return replace(contestant(rng), slip=0.3)


FIRST_TRAIN = "first_train.jsonl"
WITH_TOKEN_HEAD = RM.but(
    {
        "data.init_args.batch_size": 8,
        "model.init_args.optimization.warmup_ratio": 0.02,
        "model.init_args.token_head": {"coef": 1.0, "agreement_coef": 0.1},
    }
)
FIRST = replace(
    WITH_TOKEN_HEAD.but({TRAIN: f"{SANDBOX}/{FIRST_TRAIN}"}), title="First", checkpoint_steps=250
)
PLAN = Plan(
    stages=(
        SFT.but({"trainer.max_epochs": 1, "data.init_args.batch_size": 32}),
        FIRST,
        WITH_TOKEN_HEAD.but({POLICY: "${first}", "model.init_args.optimization.lr": 6e-4}),
    ),
    num_demonstrations=30_000,
    num_pairs=0,
    rankings={
        FIRST_TRAIN: Rankings(32_000, 8, careless),
        REWARD_TRAIN: Rankings(32_000, 8, careless, draw=1),
    },
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
