"""A small quickstart that can be killed at one step of one stage. Run by test_quickstart."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L

from lightning_rlhf.cli import pipeline
from lightning_rlhf.cli.main import main
from lightning_rlhf.cli.plan import PLAN, REWARD_TRAIN, Plan, Rankings, Stage
from lightning_rlhf.cli.quickstart import carry_out

STEP = 12
SMALLER = {
    "PPO": {
        "data.init_args.batch_size": 32,
        "model.init_args.update.num_epochs": 4,
        "model.init_args.update.minibatch_size": 16,
        "trainer.max_steps": 24,
    },
    "KTO": {"data.init_args.batch_size": 16},
}


class Kill(L.Callback):
    """End the process as a step begins."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step >= STEP:
            os.kill(os.getpid(), signal.SIGKILL)


def small(stage: Stage) -> Stage:
    """The stage in 24 steps, a checkpoint every fifth; of PPO three rollouts, a checkpoint after each."""
    size = SMALLER.get(stage.title, {"data.init_args.batch_size": 8})
    epochs = {} if stage.title == "PPO" else {"trainer.max_epochs": 1}
    steps = min(stage.checkpoint_steps, 5)
    return replace(stage.but({**size, **epochs}), checkpoint_steps=steps)


def small_plan() -> Plan:
    """The real stages at a small size."""
    return Plan(
        stages=tuple(small(stage) for stage in PLAN.stages),
        num_demonstrations=192,
        num_pairs=192,
        rankings={REWARD_TRAIN: Rankings(192)},
        num_reward_test=40,
        num_prompts=12,
    )


def fit_here(killed: str = ""):
    """``subprocess.run`` for a pipeline's trainings, in this process: starting another one takes most of the time."""

    def run(command, check):
        assert command[:3] == [sys.executable, "-m", "lightning_rlhf.cli.child"]
        words = command[3:]
        if f"--trainer.default_root_dir={killed}" in words:
            words += [f"--trainer.callbacks+={Kill.__module__}.Kill"]
        code = 0
        try:
            main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return subprocess.CompletedProcess(command, code)

    return run


if __name__ == "__main__":
    output, name = Path(sys.argv[1]), sys.argv[2]
    pipeline.subprocess.run = fit_here(killed=str(output / name / "run"))
    carry_out(small_plan(), output, 0, overwrite=False)
