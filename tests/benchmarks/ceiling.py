"""How near a reward model comes to the best accuracy: ``python -m tests.benchmarks.ceiling [--seed 1]``.

A deeper model than the quickstart's, SFT, and more rankings of more answers; judged on 3,000 held-out pairs.
Interrupted, it goes on when the same command is given again.
"""

import argparse
import os
from pathlib import Path

import torch

from lightning_rlhf.cli.plan import RM, SFT, Plan
from lightning_rlhf.cli.quickstart import carry_out

PLAN = Plan(
    stages=(
        SFT.but({"trainer.max_epochs": 1, "data.init_args.batch_size": 32}),
        RM.but({"data.init_args.batch_size": 8}),
    ),
    num_demonstrations=30_000,
    num_pairs=0,
    num_rankings=24_000,
    num_ranked=8,
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
