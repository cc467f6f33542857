"""What a run logged: curves by name, from CSV files or, where TensorBoard is installed, from its event files."""

import csv
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

NEEDS_TENSORBOARD = (
    "its logs are TensorBoard's, which only the package tensorboard reads, and that is not installed: install it, or "
    "train with a CSVLogger (trainer.logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: "
    "{save_dir: .}})"
)
NOT_CURVES = ("step", "epoch")


class Curve(NamedTuple):
    """A logged value by step.

    Attributes:
        steps: Ascending, each once.
        values: One a step; may be nan or infinite.
    """

    steps: list[int]
    values: list[float]


def read_curves(logs: Sequence[Path]) -> tuple[dict[str, Curve], list[str]]:
    """All curves of a run, by name.

    Args:
        logs: Its log folders; steps that a later one took again count as it logged them.

    Returns:
        The curves, and what could not be read.
    """
    found: dict[str, dict[int, float]] = {}
    problems: list[str] = []
    for folder in logs:
        source: Iterator[tuple[str, int, float]] = iter(())
        if (folder / "metrics.csv").is_file():
            source = _from_csv(folder / "metrics.csv")
        elif next(folder.glob("events.out.tfevents.*"), None) is not None:
            if find_spec("tensorboard") is None:
                problems.append(f"{folder.name}: {NEEDS_TENSORBOARD}")
                continue
            source = _from_tensorboard(folder)
        for name, step, value in source:
            found.setdefault(name, {})[step] = value
    curves = {
        name: Curve(sorted(values), [values[step] for step in sorted(values)])
        for name, values in sorted(found.items())
    }
    return curves, problems


def _from_csv(path: Path) -> Iterator[tuple[str, int, float]]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if not row.get("step"):  # the last line of a run that was killed while it wrote
                continue
            for name, text in row.items():
                value = number(text) if name and name not in NOT_CURVES else None
                if value is not None:
                    yield name, int(float(row["step"])), value


def number(text: str | None) -> float | None:
    """A cell as a number; None where it is none.

    Example:
        >>> number("0.5"), number(""), number("cat"), number(None)
        (0.5, None, None, None)
    """
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _from_tensorboard(folder: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            if name not in NOT_CURVES:
                yield name, int(event.step), float(event.value)


def last_finite(curve: Curve) -> float | None:
    """The last value that is a number; None where there is none.

    Example:
        >>> last_finite(Curve([1, 2], [0.5, math.nan]))
        0.5
    """
    return next((value for value in reversed(curve.values) if math.isfinite(value)), None)
