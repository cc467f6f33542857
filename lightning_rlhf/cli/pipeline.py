"""lightning-rlhf pipeline: trainings, and labelling between them, each on what the former made."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_rlhf.cli.export import export
from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.cli.stage import END, StageCheckpoint, last_checkpoint

PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
OUTPUT = "output"
Plain = str | int | float | bool | list | dict | None
"""What YAML holds. Of `Any`, and of what is made of it, jsonargparse would build every class that is named."""


@dataclass(frozen=True)
class TrainingStage:
    """One training of a pipeline: what ``lightning-rlhf fit`` would be given, and ``export`` after it.

    Attributes:
        config: Recipes and overlays, which stack; paths from where the command runs.
        overrides: What is stacked on them, nested as in a recipe or by dotted names (``data.init_args.train``);
            ``${name}`` in it is what the stage ``name`` made, ``${output}`` the folder of the pipeline.
        checkpoint_steps: Optimizer steps between the checkpoints that an interrupted stage goes on from; for PPO a
            multiple of the steps a rollout, or 1.
        merge: Add a LoRA adapter to its base's weights when it is exported; else the adapter alone is.
    """

    config: list[str]
    checkpoint_steps: int
    overrides: dict[str, Plain] = field(default_factory=dict)
    merge: bool = True

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        if not self.config:
            raise ValueError("config must name at least one recipe")
        if self.checkpoint_steps < 1:
            raise ValueError(f"checkpoint_steps must be at least 1, got {self.checkpoint_steps}")

    @property
    def artefact(self) -> str:
        """What it makes, in its folder."""
        return "model"

    def plan(self, made: Mapping[str, str], where: str) -> dict[str, Any]:
        """All that the result depends on, as plain values; the data's content aside.

        Raises:
            FileNotFoundError: If a recipe is missing.
        """
        missing = [path for path in self.config if not Path(path).is_file()]
        if missing:
            raise FileNotFoundError(f"{where}: no configuration at {missing[0]} (from {Path.cwd()})")
        return {
            "config": [yaml.safe_load(Path(path).read_text()) for path in self.config],
            "overrides": filled(self.overrides, made, where),
            "merge": self.merge,
        }

    def run(self, name: str, folder: Path, plan: Mapping[str, Any]) -> None:
        """Train, from the last checkpoint where there is one, and export."""
        (folder / "overrides.yaml").write_text(yaml.safe_dump(plan["overrides"], sort_keys=False))
        end = folder / "checkpoints" / END
        if not end.is_file():
            train(name, self, folder)
        export(end, folder / self.artefact, merge=self.merge)


@dataclass(frozen=True)
class LabellingStage:
    """Samples of a policy, ranked: the data of a later reward model, and so a round of re-labelling.

    Attributes:
        label: Arguments of ``lightning-rlhf label``, ``output`` aside, with placeholders as in ``overrides``; what the
            stage made is a file. Without a ``judge`` the pipeline ends here until people have filled in the ranks.
    """

    label: dict[str, Plain]

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        if "output" in self.label:
            raise ValueError("label names an output: leave it out, the pipeline says where its stages write")

    @property
    def artefact(self) -> str:
        """What it makes, in its folder."""
        return "ranked.jsonl"

    def plan(self, made: Mapping[str, str], where: str) -> dict[str, Any]:
        """All that the result depends on."""
        return {"label": filled(self.label, made, where)}

    def run(self, name: str, folder: Path, plan: Mapping[str, Any]) -> None:
        """Sample and rank."""
        (folder / "label.yaml").write_text(yaml.safe_dump(plan["label"], sort_keys=False))
        command = ["label", f"--config={folder / 'label.yaml'}", f"--output={folder / self.artefact}"]
        print(f"{name}: labelling", flush=True)
        in_a_child(name, command, "The same command begins the stage anew")


Stage = TrainingStage | LabellingStage


def pipeline(stages: dict[str, Stage], output: Path, overwrite: bool = False) -> None:
    """Run several stages, such as SFT, reward model and PPO; finished ones are skipped, an interrupted one goes on.

    Args:
        stages: By name, in their order.
        output: The folder to make: a folder a stage, with run/ (logs), checkpoints/ and model/, its export.
        overwrite: Where a stage's configuration has changed, run it and all later ones anew.
    """
    plans = {name: plan_of(name, stages, output) for name in stages}
    begin_anew(plans, output, overwrite=overwrite)
    for name, plan in plans.items():
        stage, folder = stages[name], output / name
        finish(name, stage, plan, folder)
        if isinstance(stage, LabellingStage) and (waiting := unranked(folder / stage.artefact)):
            print(
                f"{name}: {waiting} rows of {folder / stage.artefact} wait for people: fill in their ranks, and give "
                "the same command again"
            )
            return


def finish(name: str, stage: Stage, plan: Mapping[str, Any], folder: Path) -> None:
    """Run a stage, or what is left of it; nothing where it is finished."""
    artefact = folder / stage.artefact
    if artefact.exists():
        print(f"{name}: done already ({artefact})")
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    stage.run(name, folder, plan)


def plan_of(name: str, stages: Mapping[str, Stage], output: Path) -> dict[str, Any]:
    """All that a stage's result depends on, as plain values; the data's content aside.

    Raises:
        ValueError: If a placeholder names no earlier stage, or the name is no plain word, or taken.
        FileNotFoundError: If a recipe is missing.
    """
    if not re.fullmatch(r"\w+", name) or name == OUTPUT:
        raise ValueError(
            f"a stage's name becomes a folder and a placeholder: letters, digits and _, not {name!r} "
            f"({OUTPUT!r} is taken)"
        )
    earlier = list(stages)[: list(stages).index(name)]
    made = {OUTPUT: str(output)}
    made |= {before: str(output / before / stages[before].artefact) for before in earlier}
    return stages[name].plan(made, f"stage {name}")


def needed_by(values: Plain, stages: Mapping[str, Stage]) -> set[str]:
    """The stages that plain values name, and those that these need in turn.

    Example:
        >>> reward = TrainingStage(["rm.yaml"], 1, {"model": "${sft}"})
        >>> stages = {"sft": TrainingStage(["sft.yaml"], 1), "reward": reward, "odin": reward}
        >>> sorted(needed_by([{"reward": ["${reward}", "${output}"]}], stages))
        ['reward', 'sft']
    """
    found = set(PLACEHOLDER.findall(json.dumps(values)))
    for name, stage in reversed([*stages.items()]):
        if name in found:
            given = stage.overrides if isinstance(stage, TrainingStage) else stage.label
            found |= set(PLACEHOLDER.findall(json.dumps(given)))
    return found & stages.keys()


def unranked(path: Path) -> int:
    """Rows of ranked data whose ranks are null: nobody has compared them yet."""
    with path.open() as file:
        return sum(json.loads(line)["ranks"] is None for line in file)


def filled(value: Any, made: Mapping[str, str], where: str) -> Any:  # noqa: ANN401 - any plain value
    """Values with every ``${name}`` in their texts replaced.

    Args:
        value: Plain values, nested.
        made: What the names stand for.
        where: For the error.

    Raises:
        ValueError: If a name is not among them.

    Example:
        >>> filled({"path": "${sft}", "seeds": [1, "a ${sft}"]}, {"sft": "out/sft/model"}, "stage ppo")
        {'path': 'out/sft/model', 'seeds': [1, 'a out/sft/model']}
        >>> filled("${stf}", {"output": "out", "sft": "out/sft/model"}, "stage ppo")
        Traceback (most recent call last):
        ValueError: stage ppo: ${stf} is no earlier stage; known are output, sft
    """

    def fill(text: str) -> str:
        for name in PLACEHOLDER.findall(text):
            if name not in made:
                raise ValueError(f"{where}: ${{{name}}} is no earlier stage; known are {', '.join(made)}")
        return PLACEHOLDER.sub(lambda match: made[match[1]], text)

    return with_texts(value, fill)


def with_texts(value: Any, change: Callable[[str], Any]) -> Any:  # noqa: ANN401 - any plain value
    """Plain values with every text in them changed; keys and what is no text stay.

    Example:
        >>> with_texts({"a": ["x", 1, {"b": "y"}]}, str.upper)
        {'a': ['X', 1, {'b': 'Y'}]}
    """
    if isinstance(value, Mapping):
        return {key: with_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [with_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def begin_anew(plans: Mapping[str, Any], output: Path, *, overwrite: bool) -> None:
    """Remove the first stage that was begun with another configuration, and all after it, where that is allowed.

    Raises:
        FileExistsError: If it is not, or a stage's folder holds something else.
    """
    changed = False
    for name, plan in plans.items():
        folder = output / name
        kept = folder / "stage.yaml"
        if folder.exists() and not kept.is_file() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds something else than a stage: give another --output")
        if not kept.is_file():
            continue
        if not changed and yaml.safe_load(kept.read_text()) != plan:
            if not overwrite:
                raise FileExistsError(
                    f"stage {name} was begun with another configuration (see {kept}): change it back, give another "
                    "--output, or --overwrite to run it and all later stages anew"
                )
            changed = True
        if changed:
            shutil.rmtree(folder)


def train(name: str, stage: TrainingStage, folder: Path) -> None:
    """Run ``fit``, from the last checkpoint where there is one."""
    recipes = [
        word for path in (*stage.config, str(folder / "overrides.yaml")) for word in ("--config", path)
    ]
    command = ["fit", *recipes, *saving(stage, folder)]
    resume = last_checkpoint(folder / "checkpoints")
    if resume is not None:
        command += ["--ckpt_path", str(resume)]
    print(f"{name}: {'training' if resume is None else f'continuing from {resume}'}", flush=True)
    in_a_child(name, command, "The same command goes on from its last checkpoint")


def in_a_child(name: str, command: Sequence[str], then: str) -> None:
    """Run a command of the program in a process of its own, which ends with this one.

    Raises:
        RuntimeError: If it fails.
    """
    code = subprocess.run(
        [sys.executable, "-m", "lightning_rlhf.cli.child", *command], check=False
    ).returncode
    if code:
        raise RuntimeError(f"stage {name} ended with exit code {code}; what it says is above. {then}")


def saving(stage: TrainingStage, folder: Path) -> list[str]:
    """Flags that keep logs and checkpoints in a stage's folder: every so many steps, and at the end."""
    return [
        f"--trainer.default_root_dir={folder / 'run'}",
        f"--trainer.callbacks+={StageCheckpoint.__module__}.StageCheckpoint",
        f"--trainer.callbacks.dirpath={folder / 'checkpoints'}",
        f"--trainer.callbacks.every_n_train_steps={stage.checkpoint_steps}",
    ]


def main(arguments: list[str]) -> None:
    """Run :func:`pipeline` with arguments of the command line."""
    run_function(pipeline, arguments)
