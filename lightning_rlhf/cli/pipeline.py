"""lightning-rlhf pipeline: trainings one after the other, each on what the former made."""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_rlhf.cli.export import export
from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.cli.stage import END, StageCheckpoint, last_checkpoint

PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
OUTPUT = "output"


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
    overrides: dict[str, Any] = field(default_factory=dict)
    merge: bool = True

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        if not self.config:
            raise ValueError("config must name at least one recipe")
        if self.checkpoint_steps < 1:
            raise ValueError(f"checkpoint_steps must be at least 1, got {self.checkpoint_steps}")


def pipeline(stages: dict[str, TrainingStage], output: Path, overwrite: bool = False) -> None:
    """Train several stages, such as SFT, reward model and PPO; finished ones are skipped, an interrupted one goes on.

    Args:
        stages: By name, in their order.
        output: The folder to make: a folder a stage, with run/ (logs), checkpoints/ and model/, its export.
        overwrite: Where a stage's configuration has changed, train it and all later ones anew.
    """
    plans = {name: plan_of(name, stages, output) for name in stages}
    begin_anew(plans, output, overwrite=overwrite)
    for name, plan in plans.items():
        folder = output / name
        if (folder / "model").is_dir():
            print(f"{name}: done already ({folder / 'model'})")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
        (folder / "overrides.yaml").write_text(yaml.safe_dump(plan["overrides"], sort_keys=False))
        end = folder / "checkpoints" / END
        if not end.is_file():
            train(name, stages[name], folder)
        export(end, folder / "model", merge=stages[name].merge)


def plan_of(name: str, stages: Mapping[str, TrainingStage], output: Path) -> dict[str, Any]:
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
    made = {OUTPUT: str(output), **{before: str(output / before / "model") for before in earlier}}
    stage = stages[name]
    missing = [path for path in stage.config if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"stage {name}: no configuration at {missing[0]} (from {Path.cwd()})")
    return {
        "config": [yaml.safe_load(Path(path).read_text()) for path in stage.config],
        "overrides": filled(stage.overrides, made, f"stage {name}"),
        "merge": stage.merge,
    }


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
    if isinstance(value, Mapping):
        return {key: filled(item, made, where) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, made, where) for item in value]
    if not isinstance(value, str):
        return value
    for name in PLACEHOLDER.findall(value):
        if name not in made:
            raise ValueError(f"{where}: ${{{name}}} is no earlier stage; known are {', '.join(made)}")
    return PLACEHOLDER.sub(lambda match: made[match[1]], value)


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
                    "--output, or --overwrite to train it and all later stages anew"
                )
            changed = True
        if changed:
            shutil.rmtree(folder)


def train(name: str, stage: TrainingStage, folder: Path) -> None:
    """Run ``fit`` in a process of its own, which ends with this one, from the last checkpoint where there is one.

    Raises:
        RuntimeError: If it fails.
    """
    recipes = [
        word for path in (*stage.config, str(folder / "overrides.yaml")) for word in ("--config", path)
    ]
    command = [sys.executable, "-m", "lightning_rlhf.cli.child", "fit", *recipes, *saving(stage, folder)]
    resume = last_checkpoint(folder / "checkpoints")
    if resume is not None:
        command += ["--ckpt_path", str(resume)]
    print(f"{name}: {'training' if resume is None else f'continuing from {resume}'}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise RuntimeError(
            f"stage {name} ended with exit code {code}; what it says is above. The same command goes on from its last "
            "checkpoint"
        )


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
