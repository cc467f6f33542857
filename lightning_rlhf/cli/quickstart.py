"""lightning-rlhf quickstart: train, align and measure a tiny model on the sandbox."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from lightning_rlhf.algorithms import DPO, SFT, Optimization
from lightning_rlhf.algorithms.base import Algorithm
from lightning_rlhf.cli.evaluation import Samples, sample_and_score
from lightning_rlhf.cli.measure import divergence, win_rate
from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.cli.report import Row, console_table, write_report
from lightning_rlhf.cli.stage import train
from lightning_rlhf.data import PreferenceDataModule, SFTDataModule
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models.export import save_model, written_whole
from lightning_rlhf.objectives import Sigmoid
from lightning_rlhf.sandbox.create import create_sandbox
from lightning_rlhf.sandbox.world import World

MARK = "quickstart.json"
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
        stages: In the order of training; the others are measured against the first.
        num_demonstrations: Rows to train SFT on.
        num_pairs: Pairs to align on.
        num_prompts: Held-out prompts to sample from.
    """

    stages: tuple[tuple[Stage, Build], ...]
    num_demonstrations: int = 20_000
    num_pairs: int = 3_400
    num_prompts: int = 500


SFT_STAGE = Stage(
    name="SFT",
    metric="train/loss",
    max_epochs=2,
    batch_size=64,
    optimization=Optimization(
        lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95), schedule="cosine", warmup_ratio=0.05
    ),
)
DPO_STAGE = Stage(
    name="DPO",
    metric="train/rewards/accuracies",
    max_epochs=1,
    batch_size=16,
    optimization=Optimization(lr=1e-4, schedule="cosine", warmup_ratio=0.1),
)
DPO_OBJECTIVE = Sigmoid(beta=0.1)
SAMPLING = Sampling(max_new_tokens=64, temperature=1.0, batch_size=128)


def quickstart(output: Path = Path("quickstart"), seed: int = 0, overwrite: bool = False) -> None:
    """Train a tiny model on the sandbox, align it by DPO, and measure both by the gold reward.

    An interrupted run goes on where it was when the same command is given again.

    Args:
        output: The folder to make: sandbox/, sft/, dpo/ (each with checkpoints/, logs/, model/) and report/.
        seed: Of the task, the model and the training.
        overwrite: Start anew where the folder holds a quickstart.
    """
    carry_out(PLAN, output, seed, overwrite=overwrite)


def carry_out(plan: Plan, output: Path, seed: int, *, overwrite: bool) -> None:
    """Do what a plan says, or what is left of it.

    Args:
        plan: The stages and sizes; the same one when an interrupted run goes on.
        output: The folder to make.
        seed: Of the task, the model and the training.
        overwrite: Start anew where the folder holds a quickstart.

    Raises:
        FileExistsError: If the folder holds a finished quickstart or something else.
        ValueError: If it was begun with another seed.
    """
    console = Console()
    began = time.perf_counter()
    prepare(output, seed, overwrite=overwrite)
    world_folder = output / "sandbox"
    if not world_folder.is_dir():
        with console.status("making the sandbox"), written_whole(world_folder) as folder:
            create_sandbox(
                folder, seed=seed, num_demonstrations=plan.num_demonstrations, num_pairs=plan.num_pairs
            )
    for stage, build in plan.stages:
        run_stage(stage, build, world_folder, output, seed, console)
    report(plan, output, seed, began, console)


def prepare(output: Path, seed: int, *, overwrite: bool) -> None:
    """Make the folder, or find one to go on with.

    Raises:
        FileExistsError: If it holds a finished quickstart or something else.
        ValueError: If it was begun with another seed.
    """
    mark = output / MARK
    ours = mark.is_file()
    if output.exists() and not ours and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} holds something else than a quickstart: give another --output")
    if ours and overwrite:
        shutil.rmtree(output)
    elif (output / "report").is_dir():
        raise FileExistsError(
            f"{output} holds a finished quickstart (see {output / 'report' / 'table.md'}): give another --output, or "
            "--overwrite to do it again"
        )
    elif ours and (begun := json.loads(mark.read_text())["seed"]) != seed:
        raise ValueError(
            f"{output} was begun with --seed {begun}: give it again, or --overwrite to start anew"
        )
    output.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"seed": seed}) + "\n")


def run_stage(
    stage: Stage,
    build: Build,
    world_folder: Path,
    output: Path,
    seed: int,
    console: Console,
) -> None:
    """Train a stage unless its model is there; a model directory appears only when it is whole."""
    folder = output / stage.name.lower()
    if (folder / "model").is_dir():
        console.print(f"{stage.name}: done already")
        return
    console.rule(stage.name)
    L.seed_everything(seed, verbose=False)
    module, data = build(stage, world_folder, output)
    curve = train(
        module,
        data,
        folder,
        metric=stage.metric,
        max_epochs=stage.max_epochs,
        save_every=stage.save_every,
        gradient_clip_val=1.0,
    )
    assert module.policy is not None
    with written_whole(folder / "model") as model_folder:
        save_model(module.policy.causal_lm, model_folder)
        module.tokenizer.save_pretrained(model_folder)
        content = {"name": stage.metric, **curve.state_dict()}
        (model_folder / "training.json").write_text(json.dumps(content) + "\n")


def sft_parts(stage: Stage, world_folder: Path, output: Path) -> Parts:
    """SFT from random weights on the demonstrations."""
    module = SFT(str(world_folder / "model"), optimization=stage.optimization)
    return module, SFTDataModule(str(world_folder / "sft_train.jsonl"), batch_size=stage.batch_size)


def dpo_parts(stage: Stage, world_folder: Path, output: Path) -> Parts:
    """DPO from the SFT model on the annotators' pairs."""
    module = DPO(str(output / "sft" / "model"), objective=DPO_OBJECTIVE, optimization=stage.optimization)
    data = PreferenceDataModule(str(world_folder / "preferences_train.jsonl"), batch_size=stage.batch_size)
    return module, data


PLAN = Plan(stages=((SFT_STAGE, sft_parts), (DPO_STAGE, dpo_parts)))


def report(plan: Plan, output: Path, seed: int, began: float, console: Console) -> None:
    """Sample, score, and write the report folder: the last thing to appear, so that it means that all is done."""
    console.rule("samples")
    world = World(seed)
    prompts = world.prompts(plan.num_prompts, "val")
    rows: list[Row] = []
    samples: list[dict[str, Any]] = []
    sft: Samples | None = None
    for stage, _ in plan.stages:
        folder = output / stage.name.lower() / "model"
        drawn = sample_and_score(folder, prompts, world, sampling=SAMPLING, seed=seed, title=stage.name)
        sft = sft or drawn
        rows.append(row_of(stage, drawn, sft, json.loads((folder / "training.json").read_text())))
        samples += [
            {
                "stage": stage.name,
                "prompt": prompt,
                "completion": one.text,
                "gold": found.score,
                **asdict(found),
            }
            for prompt, one, found in zip(prompts, drawn.completions, drawn.reports, strict=True)
        ]
    seconds = time.perf_counter() - began
    with written_whole(output / "report") as folder:
        write_report(folder, rows, samples, seconds)
    console.print(console_table(rows))
    console.print(
        f"{output / 'report'} holds this table, a picture and the samples; {seconds:.0f} seconds in all"
    )


def row_of(stage: Stage, drawn: Samples, sft: Samples, training: dict[str, Any]) -> Row:
    """A stage's row of the table."""
    return Row(
        stage=stage.name,
        gold=drawn.gold,
        divergence=divergence(drawn.model, sft.model, drawn.completions),
        win_rate=win_rate(drawn.gold, sft.gold),
        mean_length=drawn.mean_length,
        malformed=drawn.malformed,
        truncated=drawn.truncated,
        seconds=training["seconds"],
        curve=training,
    )


def main(arguments: list[str]) -> None:
    """Run :func:`quickstart` with arguments of the command line."""
    run_function(quickstart, arguments)
