"""How near a reward model comes to the best accuracy: ``python -m tests.benchmarks.ceiling [--seed 1]``.

A deeper model than the quickstart's, SFT, and more rankings of more answers; judged on 3,000 held-out pairs.
Interrupted, it goes on when the same command is given again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from lightning_rlhf.algorithms import SFT
from lightning_rlhf.cli.plan import RM_STAGE, SFT_STAGE, Parts, Plan, Stage, rm_parts
from lightning_rlhf.cli.quickstart import carry_out
from lightning_rlhf.data import SFTDataModule
from lightning_rlhf.sandbox import build_policy, build_tokenizer


def deeper_sft(stage: Stage, world_folder: Path, output: Path) -> Parts:
    """SFT of a model of four layers."""
    tokenizer = build_tokenizer()
    model = build_policy(tokenizer, num_layers=4)
    module = SFT(model, tokenizer, optimization=stage.optimization)
    return module, SFTDataModule(str(world_folder / "sft_train.jsonl"), batch_size=stage.batch_size)


PLAN = Plan(
    stages=(
        (replace(SFT_STAGE, max_epochs=1, batch_size=32), deeper_sft),
        (replace(RM_STAGE, batch_size=8), rm_parts),
    ),
    num_demonstrations=30_000,
    num_pairs=0,
    num_rankings=24_000,
    num_ranked=8,
)


def main() -> None:
    """Train what is not trained yet; the quickstart's report has the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ceiling", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("ceiling"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    carry_out(PLAN, options.output, options.seed, overwrite=False)


if __name__ == "__main__":
    main()
