"""lightning-rlhf quickstart: train, align and measure a tiny model on the sandbox."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning as L
from rich.console import Console

from lightning_rlhf.algorithms import RewardModel
from lightning_rlhf.cli.evaluation import Samples, sample_and_score
from lightning_rlhf.cli.measure import divergence, win_rate
from lightning_rlhf.cli.ordering import Ordering, judge
from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.cli.plan import PLAN, Build, Plan, Stage, judged_probabilities, write_world
from lightning_rlhf.cli.report import Row, console_table, write_report
from lightning_rlhf.cli.stage import train
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models.export import save_model, written_whole
from lightning_rlhf.models.reward_export import save_reward_model
from lightning_rlhf.models.scorer import Scorer
from lightning_rlhf.sandbox.world import World

MARK = "quickstart.json"
SAMPLING = Sampling(max_new_tokens=64, temperature=1.0, batch_size=128)


def quickstart(output: Path = Path("quickstart"), seed: int = 0, overwrite: bool = False) -> None:
    """Train a tiny model on the sandbox, a reward model, and policies by DPO and KTO; measure all of them.

    An interrupted run goes on where it was when the same command is given again.

    Args:
        output: The folder to make: sandbox/, sft/, rm/, dpo/, kto/ (each with checkpoints/, logs/, model/) and report/.
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
            write_world(folder, plan, seed)
    for stage, build in plan.stages:
        run_stage(plan, stage, build, output, seed, console)
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


def run_stage(plan: Plan, stage: Stage, build: Build, output: Path, seed: int, console: Console) -> None:
    """Train a stage unless its model is there; a model directory appears only when it is whole."""
    folder = output / stage.name.lower()
    if (folder / "model").is_dir():
        console.print(f"{stage.name}: done already")
        return
    console.rule(stage.name)
    L.seed_everything(seed, verbose=False)
    module, data = build(stage, output / "sandbox", output)
    curve = train(
        module,
        data,
        folder,
        metric=stage.metric,
        max_epochs=stage.max_epochs,
        save_every=stage.save_every,
        gradient_clip_val=1.0,
    )
    content = {"name": stage.metric, **curve.state_dict()}
    with written_whole(folder / "model") as model_folder:
        if isinstance(module, RewardModel):
            save_reward_model(cast(Scorer, module.ensemble.scorers[0]), module.tokenizer, model_folder)
            content["ordering"] = asdict(judge(module, data, judged_probabilities(plan, seed)))
        else:
            assert module.policy is not None
            save_model(module.policy.causal_lm, model_folder)
            module.tokenizer.save_pretrained(model_folder)
        (model_folder / "training.json").write_text(json.dumps(content) + "\n")


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
        training = json.loads((folder / "training.json").read_text())
        if "ordering" in training:
            rows.append(reward_model_row(stage, training))
            continue
        drawn = sample_and_score(folder, prompts, world, sampling=SAMPLING, seed=seed, title=stage.name)
        sft = sft or drawn
        rows.append(policy_row(stage, drawn, sft, training))
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
    for row in rows:
        if row.ordering is not None:
            console.print(f"{row.stage}: {row.ordering}")
    console.print(
        f"{output / 'report'} holds this table, a picture and the samples; {seconds:.0f} seconds in all"
    )


def policy_row(stage: Stage, drawn: Samples, sft: Samples, training: dict[str, Any]) -> Row:
    """The row of a stage that trained a policy."""
    return Row(
        stage=stage.name,
        seconds=training["seconds"],
        gold=drawn.gold,
        divergence=divergence(drawn.model, sft.model, drawn.completions),
        win_rate=win_rate(drawn.gold, sft.gold),
        mean_length=drawn.mean_length,
        malformed=drawn.malformed,
        truncated=drawn.truncated,
        curve=training,
    )


def reward_model_row(stage: Stage, training: dict[str, Any]) -> Row:
    """The row of a stage that trained a reward model: it writes nothing, so it has no gold reward."""
    return Row(
        stage=stage.name,
        seconds=training["seconds"],
        ordering=Ordering(**training["ordering"]),
        curve=training,
    )


def main(arguments: list[str]) -> None:
    """Run :func:`quickstart` with arguments of the command line."""
    run_function(quickstart, arguments)
