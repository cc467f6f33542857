"""What the quickstart trains, on what and at what size."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning as L

from lightning_rlhf.algorithms import DPO, KTO, SFT, Optimization, RewardModel
from lightning_rlhf.algorithms.base import Algorithm
from lightning_rlhf.data import PreferenceDataModule, SFTDataModule, UnpairedDataModule
from lightning_rlhf.objectives import Sigmoid
from lightning_rlhf.sandbox.annotator import Annotator
from lightning_rlhf.sandbox.create import create_sandbox
from lightning_rlhf.sandbox.world import World

REWARD_TRAIN, REWARD_TEST = "reward_train.jsonl", "reward_test.jsonl"
REWARD_TEST_DRAW = 1
"""Of the held-out pairs that a reward model is judged on; draw 0 sets the scale of its scores."""

Parts = tuple[Algorithm, L.LightningDataModule]


@dataclass(frozen=True)
class Stage:
    """How one stage is trained; the same could stand in a recipe.

    Attributes:
        name: Of its folder.
        metric: The logged value to draw.
        max_epochs: Passes over the data.
        batch_size: Prompt groups a step.
        optimization: Optimizer and schedule.
        save_every: Optimizer steps between checkpoints.
    """

    name: str
    metric: str
    max_epochs: int
    batch_size: int
    optimization: Optimization
    save_every: int = 50


Build = Callable[[Stage, Path, Path], Parts]
"""A stage, the sandbox's folder and the quickstart's → what is trained on what."""


@dataclass(frozen=True)
class Plan:
    """What a quickstart does, and at what size.

    Attributes:
        stages: In the order of training; policies are measured against the first.
        num_demonstrations: Rows to train SFT on.
        num_pairs: Pairs to align on.
        num_rankings: Prompts with several answers, ranked, to train a reward model on.
        num_ranked: Answers in a ranking.
        num_reward_test: Held-out pairs to judge it on.
        num_prompts: Held-out prompts to sample from.
    """

    stages: tuple[tuple[Stage, Build], ...]
    num_demonstrations: int = 20_000
    num_pairs: int = 3_400
    num_rankings: int = 12_000
    num_ranked: int = 6
    num_reward_test: int = 3_000
    num_prompts: int = 500


def write_world(folder: Path, plan: Plan, seed: int) -> None:
    """Write the sandbox, and beside it the reward model's rankings and the pairs that it is judged on.

    Args:
        folder: Empty.
        plan: The sizes.
        seed: Of the world and the model's weights.
    """
    create_sandbox(folder, seed=seed, num_demonstrations=plan.num_demonstrations, num_pairs=plan.num_pairs)
    world = World(seed)
    annotator = Annotator(world)
    rankings = world.rankings(plan.num_rankings, annotator, plan.num_ranked)
    judged = world.preferences(plan.num_reward_test, annotator, "val", REWARD_TEST_DRAW)
    for name, rows in ((REWARD_TRAIN, rankings), (REWARD_TEST, judged)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def judged_probabilities(plan: Plan, seed: int) -> list[float]:
    """For each pair that a reward model is judged on, that an annotator prefers the first of two answers."""
    world = World(seed)
    annotator = Annotator(world)
    return [
        annotator.probability(*pair) for pair in world.pairs(plan.num_reward_test, "val", REWARD_TEST_DRAW)
    ]


def sft_parts(stage: Stage, world_folder: Path, output: Path) -> Parts:
    """SFT from random weights on the demonstrations."""
    module = SFT(str(world_folder / "model"), optimization=stage.optimization)
    return module, SFTDataModule(str(world_folder / "sft_train.jsonl"), batch_size=stage.batch_size)


def rm_parts(stage: Stage, world_folder: Path, output: Path) -> Parts:
    """A reward model from the SFT model on rankings by the annotators."""
    module = RewardModel(str(output / "sft" / "model"), optimization=stage.optimization)
    data = PreferenceDataModule(
        str(world_folder / REWARD_TRAIN),
        val=str(world_folder / "preferences_val.jsonl"),
        test=str(world_folder / REWARD_TEST),
        batch_size=stage.batch_size,
    )
    return module, data


def dpo_parts(stage: Stage, world_folder: Path, output: Path) -> Parts:
    """DPO from the SFT model on the annotators' pairs."""
    module = DPO(str(output / "sft" / "model"), objective=Sigmoid(beta=0.1), optimization=stage.optimization)
    data = PreferenceDataModule(str(world_folder / "preferences_train.jsonl"), batch_size=stage.batch_size)
    return module, data


def kto_parts(stage: Stage, world_folder: Path, output: Path) -> Parts:
    """KTO from the SFT model on the same answers, each labelled by itself."""
    module = KTO(str(output / "sft" / "model"), beta=0.1, optimization=stage.optimization)
    data = UnpairedDataModule(str(world_folder / "preferences_train.jsonl"), batch_size=stage.batch_size)
    return module, data


SFT_STAGE = Stage(
    name="SFT",
    metric="train/loss",
    max_epochs=2,
    batch_size=64,
    optimization=Optimization(
        lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95), schedule="cosine", warmup_ratio=0.05
    ),
)
RM_STAGE = Stage(
    name="RM",
    metric="train/accuracy",
    max_epochs=1,
    batch_size=10,
    optimization=Optimization(
        lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95), schedule="cosine", warmup_ratio=0.1
    ),
)
DPO_STAGE = Stage(
    name="DPO",
    metric="train/rewards/accuracies",
    max_epochs=1,
    batch_size=16,
    optimization=Optimization(lr=1e-4, schedule="cosine", warmup_ratio=0.1),
)
KTO_STAGE = Stage(
    name="KTO",
    metric="train/rewards/margins",
    max_epochs=1,
    batch_size=32,
    optimization=Optimization(lr=1e-4, schedule="cosine", warmup_ratio=0.1),
)
PLAN = Plan(
    stages=(
        (SFT_STAGE, sft_parts),
        (RM_STAGE, rm_parts),
        (DPO_STAGE, dpo_parts),
        (KTO_STAGE, kto_parts),
    )
)
