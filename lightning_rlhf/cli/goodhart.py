"""lightning-rlhf goodhart: over-optimisation on the sandbox, with and without what is done against it."""

import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_rlhf.callbacks.goodhart import finite
from lightning_rlhf.cli.generate import write_rows
from lightning_rlhf.cli.goodhart_report import Run, draw, markdown, outcome, read_run
from lightning_rlhf.cli.pipeline import (
    LabellingStage,
    Plain,
    Stage,
    TrainingStage,
    begin_anew,
    finish,
    needed_by,
    plan_of,
    with_texts,
)
from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.models.export import written_whole
from lightning_rlhf.sandbox.annotator import Annotator
from lightning_rlhf.sandbox.create import create_sandbox
from lightning_rlhf.sandbox.world import World

RANKED = "rankings_train.jsonl"
OF_RUN = re.compile(r"\$\{(seed|coef)\}")


@dataclass(frozen=True)
class Sizes:
    """Of every seed's sandbox.

    Attributes:
        num_demonstrations: Rows to train SFT on.
        num_pairs: Pairs that annotators compared.
        num_rankings: Prompts whose six answers annotators sorted: many more labels.
        num_layers: Of the model.
    """

    num_demonstrations: int = 16_000
    num_pairs: int = 3_400
    num_rankings: int = 6_000
    num_layers: int = 2


@dataclass(frozen=True)
class Setting:
    """One way to train the policy.

    Attributes:
        overrides: Stacked on the experiment's ``run``.
        coefs: KL coefficients, instead of the experiment's.
    """

    overrides: dict[str, Plain] = field(default_factory=dict)
    coefs: list[float] | None = None


def goodhart(
    output: Path,
    seeds: list[int],
    coefs: list[float],
    stages: dict[str, Stage],
    run: TrainingStage,
    settings: dict[str, Setting],
    sizes: Sizes = Sizes(),  # noqa: B008 - frozen
    jobs: int = 1,
    only: list[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Train policies on the sandbox at several KL coefficients, in several settings, and draw what comes of it.

    Every seed has a sandbox and models of its own. Finished stages are skipped, interrupted ones go on, when the same
    command is given again.

    Args:
        output: The folder to make: a folder a seed, which is a pipeline's, and report/ with table.md, table.json and
            goodhart.png.
        seeds: Of world, models and trainings.
        coefs: KL coefficients.
        stages: What every seed needs first, as in a pipeline: SFT, reward models.
        run: The training of a policy, with a GoodhartMonitor; what it makes does not matter, what is measured does.
        settings: By name, in the order of the table.
        sizes: Of the sandboxes.
        jobs: Trainings at a time, each with its share of the processor.
        only: The settings to train and draw now, and what they need; by default all.
        overwrite: Where a stage's configuration has changed, run it and all that comes after it anew.
    """
    if unknown := set(only or ()) - set(settings):
        known_names = ", ".join(map(repr, settings))
        raise ValueError(f"only names {min(unknown)!r}, which is no setting: known are {known_names}")
    settings = {name: setting for name, setting in settings.items() if only is None or name in only}
    if not settings:
        raise ValueError(
            "there is no setting to train: give settings, and leave only out or name one of them"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be at least one, each once, got {seeds}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    trainings = [Policies(seed, coefs, stages, run, settings, output / f"seed_{seed}") for seed in seeds]
    for one in trainings:  # what cannot be is found before anything is trained
        begin_anew(one.plans, one.output, overwrite=overwrite)
    with ThreadPoolExecutor(jobs) as pool:
        # In this order nothing that a training waits for is behind it.
        ready = [pool.submit(one.prepare, sizes) for one in trainings]
        waits = [
            pool.submit(one.train, name, ready[place])
            for place, one in enumerate(trainings)
            for name in one.planned
        ]
        every: list[Future[Any]] = [*ready, *waits]
        try:
            for done in as_completed(every):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    order = list(settings)
    runs = sorted(
        (wait.result() for wait in waits), key=lambda one: (order.index(one.setting), one.coef, one.seed)
    )
    with written_whole(output / "report", overwrite=True) as folder:
        write(runs, folder)
    print(f"wrote {output / 'report'}\n\n{markdown(runs)}")


class Policies:
    """What is trained of one seed.

    Args:
        seed: Of all of it.
        coefs: KL coefficients, where a setting has none.
        stages: What the experiment needs first; of these only what the settings name.
        run: The training of a policy.
        settings: By name.
        output: The seed's folder.

    Attributes:
        planned: Setting, coefficient and training, by the name of its folder.
        plans: All that each stage and training depends on.

    Raises:
        ValueError: If a placeholder names no stage, two settings would have one folder, or a labelling stage has no
            judge.
        FileNotFoundError: If a recipe is missing.
    """

    def __init__(
        self,
        seed: int,
        coefs: list[float],
        stages: Mapping[str, Stage],
        run: TrainingStage,
        settings: Mapping[str, Setting],
        output: Path,
    ) -> None:
        self.seed, self.output = seed, output
        self.planned: dict[str, tuple[str, float, TrainingStage]] = {}
        for name, setting in settings.items():
            for place, coef in enumerate(coefs_of(setting, coefs)):
                folder = stage_name(name, place)
                if folder in self.planned or folder in stages:
                    raise ValueError(
                        f"setting {name!r} would be trained in {folder}, which is taken: rename it"
                    )
                self.planned[folder] = name, coef, run_stage(run, setting, seed, coef)
        needed = needed_by([stage.overrides for _, _, stage in self.planned.values()], stages)
        self.stages = {name: seeded_stage(stage, seed) for name, stage in stages.items() if name in needed}
        for name, stage in self.stages.items():
            if isinstance(stage, LabellingStage) and stage.label.get("judge") is None:
                raise ValueError(f"stage {name} has no judge: an experiment does not wait for people")
        self.plans = {name: plan_of(name, self.stages, output) for name in self.stages}
        for name, (_, _, training) in self.planned.items():
            self.plans[name] = plan_of(name, {**self.stages, name: training}, output)

    def prepare(self, sizes: Sizes) -> None:
        """Make the sandbox and what all trainings need, or what is left of it."""
        if not (self.output / "sandbox").is_dir():
            with written_whole(self.output / "sandbox") as folder:
                write_sandbox(folder, self.seed, sizes)
        for name, stage in self.stages.items():
            finish(name, stage, self.plans[name], self.output / name)

    def train(self, name: str, ready: Future[None]) -> Run:
        """Train one policy when all it needs is ready, and read what its monitor wrote."""
        ready.result()
        setting, coef, stage = self.planned[name]
        finish(name, stage, self.plans[name], self.output / name)
        return read_run(setting, coef, self.seed, written_by_monitor(self.output / name))


def write_sandbox(folder: Path, seed: int, sizes: Sizes) -> None:
    """A sandbox, and beside it rankings by the same annotators."""
    create_sandbox(
        folder,
        seed=seed,
        num_demonstrations=sizes.num_demonstrations,
        num_pairs=sizes.num_pairs,
        num_layers=sizes.num_layers,
    )
    world = World(seed)
    write_rows(world.rankings(sizes.num_rankings, Annotator(world)), folder / RANKED)


def coefs_of(setting: Setting, coefs: list[float]) -> list[float]:
    """A setting's own coefficients, or the experiment's."""
    return coefs if setting.coefs is None else setting.coefs


def stage_name(setting: str, place: int) -> str:
    """A name that can be a folder.

    Example:
        >>> stage_name("worst of four", 1)
        'worst_of_four_1'
    """
    return f"{re.sub(r'[^0-9A-Za-z]+', '_', setting).strip('_')}_{place}"


def run_stage(run: TrainingStage, setting: Setting, seed: int, coef: float) -> TrainingStage:
    """The training of a policy in one setting."""
    overrides = {**run.overrides, **setting.overrides}
    return replace(run, overrides=known(overrides, {"seed": seed, "coef": coef}))


def seeded_stage(stage: Stage, seed: int) -> Stage:
    """A stage in which ``${seed}`` is known."""
    if isinstance(stage, TrainingStage):
        return replace(stage, overrides=known(stage.overrides, {"seed": seed}))
    return replace(stage, label=known(stage.label, {"seed": seed}))


def known(value: Any, numbers: Mapping[str, float]) -> Any:  # noqa: ANN401 - any plain value
    """Values with ``${seed}`` and ``${coef}`` replaced; other placeholders are left to the pipeline.

    Example:
        >>> known({"seed": "${seed}", "path": "${sft}", "name": ["run ${seed}"]}, {"seed": 3})
        {'seed': 3, 'path': '${sft}', 'name': ['run 3']}
    """

    def fill(text: str) -> str | float:
        whole = OF_RUN.fullmatch(text)
        if whole and whole[1] in numbers:
            return numbers[whole[1]]
        return OF_RUN.sub(lambda found: str(numbers.get(found[1], found[0])), text)

    return with_texts(value, fill)


def written_by_monitor(folder: Path) -> Path:
    """The folder of what the monitor of a stage wrote; of an interrupted one the last, which has all.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = sorted(folder.glob("run/**/goodhart/evaluations.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} has no goodhart/evaluations.json: `run` needs a GoodhartMonitor")
    return found[-1].parent


def write(runs: list[Run], folder: Path) -> None:
    """The table, its numbers and the picture."""
    (folder / "table.md").write_text(markdown(runs))
    rows = [
        {"setting": one.setting, "coef": one.coef, "seed": one.seed}
        | {name: finite(value) for name, value in outcome(one)._asdict().items()}
        for one in runs
    ]
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(runs).savefig(folder / "goodhart.png", dpi=130)


def main(arguments: list[str]) -> None:
    """Run :func:`goodhart` with arguments of the command line."""
    run_function(goodhart, arguments)
