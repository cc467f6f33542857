"""A small quickstart that can be killed at one step of one stage. Run by test_quickstart."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from lightning_rlhf.cli.plan import PLAN, Build, Plan, Stage
from lightning_rlhf.cli.quickstart import carry_out


def killed_at(step: int, build: Build) -> Build:
    """What ``build`` builds, with data that kill the process as a step begins."""

    def parts(stage: Stage, world_folder: Path, output: Path):
        module, data = build(stage, world_folder, output)

        def deliver(batch, dataloader_idx):
            if data.trainer.training and data.trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch

        data.on_after_batch_transfer = deliver
        return module, data

    return parts


def small_plan(stage_name: str = "", step: int = -1) -> Plan:
    """The real stages at a size of 24 steps each, a checkpoint every fifth."""
    stages = (
        (
            replace(stage, batch_size=16 if stage.name == "KTO" else 8, max_epochs=1, save_every=5),
            killed_at(step, build) if stage.name == stage_name else build,
        )
        for stage, build in PLAN.stages
    )
    return Plan(
        stages=tuple(stages),
        num_demonstrations=192,
        num_pairs=192,
        num_rankings=192,
        num_reward_test=40,
        num_prompts=12,
    )


if __name__ == "__main__":
    carry_out(small_plan(sys.argv[2], int(sys.argv[3])), Path(sys.argv[1]), 0, overwrite=False)
