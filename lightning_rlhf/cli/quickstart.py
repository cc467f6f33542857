"""lightning-rlhf quickstart: train, align and measure a tiny model on the sandbox."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_rlhf.cli.evaluation import Samples, sample_and_score
from lightning_rlhf.cli.measure import divergence, win_rate
from lightning_rlhf.cli.ordering import Ordering, judge
from lightning_rlhf.cli.pipeline import pipeline
from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.cli.plan import PLAN, REWARD_TEST, Plan, Stage, judged_probabilities, write_world
from lightning_rlhf.cli.report import Row, console_table, write_report
from lightning_rlhf.cli.stage import END, logged, training_seconds
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models.export import written_whole
from lightning_rlhf.models.reward_directory import is_classifier
from lightning_rlhf.sandbox.world import World

MARK = "quickstart.json"
SAMPLING = Sampling(max_new_tokens=64, temperature=1.0, batch_size=128)


def quickstart(output: Path = Path("quickstart"), seed: int = 0, overwrite: bool = False) -> None:
    """Train a tiny model on the sandbox, a reward model, and policies by DPO, KTO and PPO; measure all of them.

    An interrupted run goes on where it was when the same command is given again.

    Args:
        output: The folder to make: sandbox/, a folder a stage (sft/, rm/, dpo/, kto/, ppo/; see pipeline) and report/.
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
        RuntimeError: If a stage fails.
    """
    console = Console()
    began = time.perf_counter()
    prepare(output, seed, overwrite=overwrite)
    world_folder = output / "sandbox"
    if not world_folder.is_dir():
        with console.status("making the sandbox"), written_whole(world_folder) as folder:
            write_world(folder, plan, seed)
    pipeline({stage.name: stage.training(seed) for stage in plan.stages}, output)
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


def report(plan: Plan, output: Path, seed: int, began: float, console: Console) -> None:
    """Sample, score, and write the report folder: the last thing to appear, so that it means that all is done."""
    console.rule("samples")
    world = World(seed)
    prompts = world.prompts(plan.num_prompts, "val")
    rows: list[Row] = []
    samples: list[dict[str, Any]] = []
    sft: Samples | None = None
    for stage in plan.stages:
        folder = output / stage.name
        if is_classifier(str(folder / "model")):
            rows.append(reward_model_row(stage, folder, ordering(plan, output, stage, seed)))
            continue
        drawn = sample_and_score(
            folder / "model", prompts, world, sampling=SAMPLING, seed=seed, title=stage.title
        )
        sft = sft or drawn
        rows.append(policy_row(stage, folder, drawn, sft))
        samples += [
            {
                "stage": stage.title,
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
    for row in rows:
        if row.ordering is not None:
            console.print(f"{row.stage}: {row.ordering}")
    console.print(
        f"{output / 'report'} holds this table, a picture and the samples; {seconds:.0f} seconds in all"
    )


def ordering(plan: Plan, output: Path, stage: Stage, seed: int) -> Ordering:
    """How a reward model orders the held-out pairs: measured once, and kept beside the model."""
    folder = output / stage.name
    if not (folder / "judged").is_dir():
        found = judge(
            folder / "checkpoints" / END, output / "sandbox" / REWARD_TEST, judged_probabilities(plan, seed)
        )
        with written_whole(folder / "judged") as judged:
            (judged / "ordering.json").write_text(json.dumps(asdict(found)) + "\n")
    return Ordering(**json.loads((folder / "judged" / "ordering.json").read_text()))


def policy_row(stage: Stage, folder: Path, drawn: Samples, sft: Samples) -> Row:
    """The row of a stage that trained a policy."""
    return Row(
        stage=stage.title,
        seconds=training_seconds(folder / "checkpoints" / END),
        gold=drawn.gold,
        divergence=divergence(drawn.model, sft.model, drawn.completions),
        win_rate=win_rate(drawn.gold, sft.gold),
        mean_length=drawn.mean_length,
        malformed=drawn.malformed,
        truncated=drawn.truncated,
        curve=curve(stage, folder),
    )


def reward_model_row(stage: Stage, folder: Path, found: Ordering) -> Row:
    """The row of a stage that trained a reward model: it writes nothing, so it has no gold reward."""
    seconds = training_seconds(folder / "checkpoints" / END)
    return Row(stage=stage.title, seconds=seconds, ordering=found, curve=curve(stage, folder))


def curve(stage: Stage, folder: Path) -> dict[str, Any]:
    """What the stage logged."""
    return {
        "name": stage.metric,
        "unit": stage.unit,
        **logged(folder / "run" / "lightning_logs", stage.metric),
    }


def main(arguments: list[str]) -> None:
    """Run :func:`quickstart` with arguments of the command line."""
    run_function(quickstart, arguments)
