"""lightning-rlhf report: one HTML file that shows what a run, or a pipeline, did."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.cli.run_facts import RUN_FILE
from lightning_rlhf.cli.run_folders import STAGE_FILE, RunFolder, natural, run_folders
from lightning_rlhf.cli.run_logs import Curve, read_curves
from lightning_rlhf.models.export import read_checkpoint

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that is known of a run; what it did not leave is None or empty.

    Attributes:
        name: See :class:`~lightning_rlhf.cli.run_folders.RunFolder`.
        path: Its folder.
        algorithm: The class that was trained, or ``labelling``.
        began: When, by its own record.
        ended: When its last file of numbers was written.
        seconds: Of training, by Lightning's ``Timer``.
        steps: Optimizer steps, by the newest checkpoint.
        configuration: As YAML, and the name of its file.
        versions: By package.
        curves: By logged name.
        goodhart: ``goodhart.json``.
        evaluations: ``evaluations.json``; empty without.
        hacking: ``hacking.json``; empty without.
        samples: Rows of ``SampleTable`` by step.
        ranked: Rows of a labelling stage.
        problems: What could not be read, in words.
    """

    name: str
    path: Path
    algorithm: str | None = None
    began: datetime | None = None
    ended: datetime | None = None
    seconds: float | None = None
    steps: int | None = None
    configuration: tuple[str, str] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    goodhart: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    hacking: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    ranked: int | None = None
    problems: list[str] = field(default_factory=list)


class Reader:
    """Reads files of a run; what cannot be read becomes a problem in words, and nothing else.

    Args:
        folder: What the names in problems start from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def read(self, path: Path | None, parse: Callable[[Path], T], default: T) -> T:
        """What ``parse`` makes of a file; ``default`` where there is none, or it cannot be read."""
        if path is None or not path.is_file():
            return default
        try:
            return parse(path)
        except (ValueError, KeyError, OSError, yaml.YAMLError) as error:
            name = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
            self.problems.append(f"{name} could not be read: {str(error).splitlines()[0]}")
            return default

    def json(self, path: Path | None, default: T) -> T:
        """The content of a JSON file."""
        return self.read(path, lambda found: json.loads(found.read_text()), default)


def gather(folder: RunFolder) -> Run:
    """Read all that a run left."""
    reader = Reader(folder.path)
    if folder.is_stage and not folder.logs and (folder.path / "label.yaml").is_file():
        return _labelling(folder, reader)
    curves, problems = read_curves(folder.logs)
    configuration = _configuration(folder, reader)
    checkpoint: dict[str, Any] = reader.read(_newest_checkpoint(folder), read_checkpoint, {})
    facts: list[dict[str, Any]] = [reader.json(log / RUN_FILE, {}) for log in folder.logs]
    evaluated = _last(folder.logs, "goodhart/evaluations.json")
    written = [log / name for log in folder.logs for name in ("metrics.csv", "hacking/hacking.json")]
    return Run(
        name=folder.name,
        path=folder.path,
        algorithm=_class_name(configuration) or checkpoint.get("algorithm"),
        began=next((datetime.fromisoformat(one["began"]) for one in facts if "began" in one), None),
        ended=_written([*written, *([evaluated] if evaluated else [])]),
        seconds=_seconds(checkpoint),
        steps=checkpoint.get("global_step"),
        configuration=configuration,
        versions=_versions(facts, checkpoint),
        curves=curves,
        goodhart=reader.json(_last(folder.logs, "goodhart/goodhart.json"), None),
        evaluations=reader.json(evaluated, []),
        hacking=reader.json(_last(folder.logs, "hacking/hacking.json"), []),
        samples=_samples(folder.logs, reader),
        problems=problems + reader.problems,
    )


def _labelling(folder: RunFolder, reader: Reader) -> Run:
    ranked = folder.path / "ranked.jsonl"
    label = folder.path / "label.yaml"
    return Run(
        name=folder.name,
        path=folder.path,
        algorithm="labelling",
        ended=_written([ranked]),
        configuration=("label.yaml", label.read_text()),
        ranked=reader.read(ranked, lambda path: len(path.read_text().splitlines()), None),
        problems=reader.problems,
    )


def _last(logs: Sequence[Path], name: str) -> Path | None:
    """A file of the last log folder that has it: a continued run goes on with what was in it."""
    return next((log / name for log in reversed(logs) if (log / name).is_file()), None)


def _written(paths: Sequence[Path]) -> datetime | None:
    times = [path.stat().st_mtime for path in paths if path.is_file()]
    return datetime.fromtimestamp(max(times)).astimezone() if times else None


def _configuration(folder: RunFolder, reader: Reader) -> tuple[str, str] | None:
    for name in ("config.yaml", "hparams.yaml"):
        path = _last(folder.logs, name)
        text = reader.read(path, Path.read_text, "")
        if text.strip() not in ("", "{}"):
            return name, text
    stage = folder.path / STAGE_FILE
    return (STAGE_FILE, stage.read_text()) if folder.is_stage else None


def _class_name(configuration: tuple[str, str] | None) -> str | None:
    """The module's class in what LightningCLI saved; None in anything else."""
    if configuration is None or configuration[0] != "config.yaml":
        return None
    try:
        content = yaml.safe_load(configuration[1])
    except yaml.YAMLError:
        return None
    model = content.get("model") if isinstance(content, dict) else None
    path = model.get("class_path") if isinstance(model, dict) else None
    return str(path).rpartition(".")[2] if path else None


def _newest_checkpoint(folder: RunFolder) -> Path | None:
    places = [log / "checkpoints" for log in folder.logs] + [folder.path / "checkpoints"]
    found = [path for place in places for path in place.glob("*.ckpt") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _seconds(checkpoint: dict[str, Any]) -> float | None:
    timer = checkpoint.get("callbacks", {}).get("Timer")
    return float(timer["time_elapsed"]["train"]) if timer else None


def _versions(facts: Sequence[dict[str, Any]], checkpoint: dict[str, Any]) -> dict[str, str]:
    recorded = [one["versions"] for one in facts if "versions" in one]
    if recorded:
        return dict(recorded[-1])
    lightning = checkpoint.get("pytorch-lightning_version")
    return {"lightning": str(lightning)} if lightning else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _samples(logs: Sequence[Path], reader: Reader) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for log in logs:
        for path in sorted(log.glob("samples/step-*.jsonl"), key=natural):
            rows: list[dict[str, Any]] = reader.read(path, _json_lines, [])
            if rows:
                found[int(path.stem.removeprefix("step-"))] = rows
    return dict(sorted(found.items()))


def report(run_dir: Path, output: Path | None = None) -> None:
    """Write one HTML file, for a browser without a network, of a run, a stage, a pipeline or a quickstart.

    Args:
        run_dir: A Trainer's log folder, or a folder with several: a pipeline's, a stage's, a quickstart's.
        output: The file to write; by default report.html in the folder.
    """
    from lightning_rlhf.cli.run_report_page import page

    runs = [gather(folder) for folder in run_folders(run_dir)]
    if output is not None and output.is_dir():
        raise IsADirectoryError(
            f"--output names a folder, {output}: give the file to write, such as report.html"
        )
    target = output or run_dir / "report.html"
    text = page(run_dir, runs)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    for run in runs:
        for problem in run.problems:
            print(f"{run.name or run_dir}: {problem}")
    print(f"wrote {target}: {', '.join(run.name or run_dir.name for run in runs)}")


def main(arguments: list[str]) -> None:
    """Run :func:`report` with arguments of the command line."""
    run_function(report, arguments, positional="run_dir")
