"""What the quickstart trains, on what and at what size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from lightning_rlhf.cli.generate import write_rows
from lightning_rlhf.cli.pipeline import TrainingStage
from lightning_rlhf.sandbox.annotator import Annotator
from lightning_rlhf.sandbox.create import create_sandbox
from lightning_rlhf.sandbox.world import World
from lightning_rlhf.sandbox.writing import Style, contestant

RECIPES = Path(__file__).with_name("quickstart_recipes")
"""A recipe a stage, for ``lightning-rlhf fit`` as well; part of the package."""
REWARD_TRAIN, REWARD_TEST = "reward_train.jsonl", "reward_test.jsonl"
REWARD_TEST_DRAW = 1
"""Of the held-out pairs that a reward model is judged on; draw 0 sets the scale of its scores."""


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline, and how it is shown.

    Attributes:
        title: Of its row in the table; in lower case its name and folder.
        recipe: Its file among :data:`RECIPES`.
        metric: The logged value to draw.
        overrides: What is stacked on the recipe; see :class:`~lightning_rlhf.cli.pipeline.TrainingStage`.
        checkpoint_steps: Optimizer steps between checkpoints.
        unit: What a step of the metric is.
    """

    title: str
    recipe: str
    metric: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_steps: int = 50
    unit: str = "optimizer step"

    @property
    def name(self) -> str:
        """In the pipeline."""
        return self.title.lower()

    def but(self, overrides: Mapping[str, Any]) -> "Stage":
        """The stage with further overrides."""
        return replace(self, overrides={**self.overrides, **overrides})

    def training(self, seed: int) -> TrainingStage:
        """What the pipeline runs: seeded, and logging where the report looks."""
        common: dict[str, Any] = {
            "seed_everything": seed,
            "trainer.logger.init_args.save_dir": f"${{output}}/{self.name}/run",
        }
        return TrainingStage(
            config=[str(RECIPES / self.recipe)],
            checkpoint_steps=self.checkpoint_steps,
            overrides={**common, **self.overrides},
        )


@dataclass(frozen=True)
class Rankings:
    """Prompts with several answers, sorted by an annotator, to train a reward model on.

    Attributes:
        num_prompts: How many.
        num_completions: Answers to each.
        writer: Whose answers they are.
        draw: Another one has other prompts and answers.
    """

    num_prompts: int
    num_completions: int = 6
    writer: Callable[[Random], Style] = contestant
    draw: int = 0


@dataclass(frozen=True)
class Plan:
    """What a quickstart does, and at what size.

    Attributes:
        stages: In the order of training; policies are measured against the first.
        num_demonstrations: Rows to train SFT on.
        num_pairs: Pairs to align on.
        rankings: By the name of their file in the sandbox's folder.
        num_reward_test: Held-out pairs to judge reward models on.
        num_prompts: Held-out prompts to sample from.
        num_layers: Of the model.
    """

    stages: tuple[Stage, ...]
    num_demonstrations: int = 20_000
    num_pairs: int = 3_400
    rankings: Mapping[str, Rankings] = field(default_factory=lambda: {REWARD_TRAIN: Rankings(12_000)})
    num_reward_test: int = 3_000
    num_prompts: int = 500
    num_layers: int = 2


def write_world(folder: Path, plan: Plan, seed: int) -> None:
    """Write the sandbox, and beside it rankings for reward models and the pairs that they are judged on.

    Args:
        folder: Empty.
        plan: The sizes.
        seed: Of the world and the model's weights.
    """
    create_sandbox(
        folder,
        seed=seed,
        num_demonstrations=plan.num_demonstrations,
        num_pairs=plan.num_pairs,
        num_layers=plan.num_layers,
    )
    world = World(seed)
    annotator = Annotator(world)
    for name, of in plan.rankings.items():
        rows = world.rankings(
            of.num_prompts, annotator, of.num_completions, seed=of.draw, writer=of.writer
        )
        write_rows(rows, folder / name)
    judged = world.preferences(plan.num_reward_test, annotator, "val", REWARD_TEST_DRAW)
    write_rows(judged, folder / REWARD_TEST)


def judged_probabilities(plan: Plan, seed: int) -> list[float]:
    """For each pair that a reward model is judged on, that an annotator prefers the first of two answers."""
    world = World(seed)
    annotator = Annotator(world)
    return [
        annotator.probability(*pair) for pair in world.pairs(plan.num_reward_test, "val", REWARD_TEST_DRAW)
    ]


POLICY, TRAIN, SANDBOX = "model.init_args.policy.path", "data.init_args.train", "${output}/sandbox"
ON_PAIRS = {POLICY: "${sft}", TRAIN: f"{SANDBOX}/preferences_train.jsonl"}
SFT = Stage(
    "SFT", "sft.yaml", "train/loss", {POLICY: f"{SANDBOX}/model", TRAIN: f"{SANDBOX}/sft_train.jsonl"}
)
RM = Stage(
    "RM",
    "reward_model.yaml",
    "train/accuracy",
    {
        POLICY: "${sft}",
        TRAIN: f"{SANDBOX}/{REWARD_TRAIN}",
        "data.init_args.val": f"{SANDBOX}/preferences_val.jsonl",
    },
)
DPO = Stage("DPO", "dpo.yaml", "train/rewards/accuracies", ON_PAIRS)
KTO = Stage("KTO", "kto.yaml", "train/rewards/margins", ON_PAIRS)
PPO = Stage(
    "PPO",
    "ppo.yaml",
    "train/objective/scores",
    {**ON_PAIRS, "model.init_args.reward.init_args.model": "${rm}"},
    checkpoint_steps=1,  # after every rollout, however many steps that is
    unit="rollout",
)
PLAN = Plan(stages=(SFT, RM, DPO, KTO, PPO))
