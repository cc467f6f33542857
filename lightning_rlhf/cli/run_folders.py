"""Where the runs of a folder are: log folders, by themselves or those of a pipeline's stages."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STAGE_FILE = "stage.yaml"
MARKS = ("metrics.csv", "hparams.yaml", "config.yaml", "goodhart/goodhart.json", "hacking/hacking.json")
PATTERNS = ("samples/step-*.jsonl", "events.out.tfevents.*")
# Of a log folder or a stage, and of whatever else lies in a pipeline's folder: no runs are in them.
NO_RUNS = {"checkpoints", "goodhart", "hacking", "samples", "model", "sandbox", "report", "judged"}


@dataclass(frozen=True)
class RunFolder:
    """One training, or one labelling stage of a pipeline.

    Attributes:
        name: Its path from the folder that was asked about; "" for that folder itself.
        path: The folder: a stage's, or the log folder.
        logs: Log folders in their order: several where a stage was interrupted, none where it labels.
        is_stage: Whether it is a stage of a pipeline.
    """

    name: str
    path: Path
    logs: tuple[Path, ...]
    is_stage: bool = False


def run_folders(folder: Path) -> list[RunFolder]:
    """The runs of a folder: stages in the order in which they were begun, then log folders that belong to none.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing of a run in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: give the folder of a run, a stage or a pipeline")
    walked = sorted(_walk(folder), key=natural)
    logs = [path for path in walked if is_log_folder(path)]
    stages = [path for path in walked if (path / STAGE_FILE).is_file()]
    stages.sort(key=lambda path: (path / STAGE_FILE).stat().st_mtime)
    found = []
    for stage in stages:
        own = tuple(path for path in logs if path.is_relative_to(stage))
        logs = [path for path in logs if path not in own]
        found.append(RunFolder(_name(stage, folder), stage, own, is_stage=True))
    found += [RunFolder(_name(path, folder), path, (path,)) for path in logs]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no run: looked for {', '.join((STAGE_FILE, *MARKS, *PATTERNS))} in it and in the folders "
            "below it. Give the Trainer's log folder (such as lightning_logs/version_0), or the folder of a pipeline; "
            "a training without a logger leaves nothing to report: set trainer.logger to a CSVLogger"
        )
    return found


def is_log_folder(path: Path) -> bool:
    """Whether something of a run lies directly in it."""
    return any((path / mark).is_file() for mark in MARKS) or any(
        next(path.glob(pattern), None) is not None for pattern in PATTERNS
    )


def natural(path: Path) -> list[tuple[int, str]]:
    """A key by which ``version_2`` comes before ``version_10``.

    Example:
        >>> natural(Path("version_2")) < natural(Path("version_10"))
        True
    """
    return [(int(part or -1), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _walk(folder: Path) -> Iterator[Path]:
    for path, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if name not in NO_RUNS and not name.startswith(".")]
        yield Path(path)


def _name(path: Path, folder: Path) -> str:
    return "" if path == folder else str(path.relative_to(folder))
