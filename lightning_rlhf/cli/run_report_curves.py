"""A run's curves as small pictures, those of training and validation on the same axes."""

import math
from collections.abc import Mapping
from typing import NamedTuple
from xml.etree.ElementTree import Element

from lightning_rlhf.cli.markup import element
from lightning_rlhf.cli.run_logs import Curve
from lightning_rlhf.cli.run_report_texts import DETECTORS, GROUPS, MEANINGS, UNIT, Meaning
from lightning_rlhf.cli.svg import MAX_POINTS, Chart, Line, draw

STAGES = ("train", "val", "test")
MONITORS = ("goodhart", "hacking")
FOLDED = 9
"""More pictures than that in a group are shown when the reader asks for them."""


class Panel(NamedTuple):
    """One small picture.

    Attributes:
        name: Without ``train/`` or ``val/``.
        curves: By ``train``, ``val``, ``test``, or "" where the name says nothing.
        bands: Lower and upper ends of those that have an interval.
    """

    name: str
    curves: dict[str, Curve]
    bands: dict[str, tuple[Curve, Curve]]


def panels(curves: Mapping[str, Curve]) -> dict[str, list[Panel]]:
    """What is drawn, by group: the name up to its last slash. Ends of intervals are bands of what they belong to.

    Example:
        >>> one = Curve([0, 1], [1.0, 2.0])
        >>> names = ("train/loss", "val/loss", "goodhart/gap", "goodhart/gap_lower", "goodhart/gap_upper")
        >>> {group: [panel.name for panel in several] for group, several in panels(dict.fromkeys(names, one)).items()}
        {'': ['loss'], 'goodhart': ['goodhart/gap']}
    """
    ends = {f"{name}_{end}" for name in curves for end in ("lower", "upper") if f"{name}_lower" in curves}
    found: dict[str, Panel] = {}
    for name, curve in curves.items():
        if name in ends:
            continue
        stage, _, rest = name.partition("/")
        stage, rest = (stage, rest) if stage in STAGES else ("", name)
        panel = found.setdefault(rest, Panel(rest, {}, {}))
        panel.curves[stage] = curve
        if f"{name}_lower" in curves and f"{name}_upper" in curves:
            panel.bands[stage] = (curves[f"{name}_lower"], curves[f"{name}_upper"])
    groups: dict[str, list[Panel]] = {}
    for panel in found.values():
        groups.setdefault(panel.name.rpartition("/")[0], []).append(panel)
    order, known = list(GROUPS), list(MEANINGS)
    for several in groups.values():
        several.sort(key=lambda panel: known.index(panel.name) if panel.name in known else len(known))
    return dict(sorted(groups.items(), key=lambda g: order.index(g[0]) if g[0] in order else len(order)))


def meaning(name: str) -> Meaning:
    """What a name says; of one that is not known, that it is as the run logged it."""
    if name in MEANINGS:
        return MEANINGS[name]
    detector = name.removeprefix("hacking/")
    for one in DETECTORS if detector != name else ():
        kind = detector.removeprefix(one.name)
        if kind in ("", "_change", "_reference", "_ratio"):
            words = {
                "": "",
                "_change": ", change",
                "_reference": ", control",
                "_ratio": ", ratio to the start",
            }
            unit = {"_ratio": "ratio"}.get(kind, one.unit)
            return Meaning(one.title + words[kind], unit, one.sentence)
    if name.startswith("rewards/"):
        return Meaning(f"Reward: {name.removeprefix('rewards/')}", UNIT, "A part of the reward.")
    if name.startswith("lr-"):
        return Meaning("Learning rate", "per step", f"As the optimizer used it ({name}).")
    return Meaning(name, "as logged", "A name of the run's own; the report knows nothing about it.")


def curves_section(curves: Mapping[str, Curve], algorithm: str | None) -> list[Element]:
    """Small pictures of all curves of at least two points, by group, and a table of the other values."""
    shown: list[Element] = []
    folded: list[Element] = []
    for group, several in panels(curves).items():
        title = GROUPS.get(group, group)
        unit = step_unit(group, algorithm)
        pictures = [picture(panel, title, unit) for panel in several if drawable(panel)]
        if len(pictures) > FOLDED or (pictures and group in MONITORS):
            summary = element(
                "summary", f"{title}: {len(pictures)} {'picture' if len(pictures) == 1 else 'pictures'}"
            )
            folded.append(element("details", summary, element("div", pictures, class_="grid")))
        else:
            shown += pictures
    parts = [element("div", shown, class_="grid")] if shown else []
    parts += folded
    single = {name: curve for name, curve in curves.items() if finite_points(curve) == 1}
    if single:
        rows = [
            element(
                "tr",
                element("td", element("code", name)),
                element("td", f"{value_of(curve):.4g} ({meaning(base(name)).unit})", class_="number"),
                element("td", f"step {curve.steps[-1]}"),
            )
            for name, curve in single.items()
        ]
        table = element("div", element("table", element("tbody", rows)), class_="scroll")
        parts.append(element("details", element("summary", f"Logged once: {len(single)} values"), table))
    return parts


def finite_points(curve: Curve) -> int:
    """How many of its values are numbers."""
    return sum(math.isfinite(value) for value in curve.values)


def value_of(curve: Curve) -> float:
    """The one number of a curve that has one."""
    return next(value for value in curve.values if math.isfinite(value))


def base(name: str) -> str:
    """A logged name without ``train/`` or ``val/``."""
    stage, _, rest = name.partition("/")
    return rest if stage in STAGES else name


def drawable(panel: Panel) -> bool:
    """Whether one of its curves has two points."""
    return any(finite_points(curve) > 1 for curve in panel.curves.values())


def step_unit(group: str, algorithm: str | None) -> str:
    """What a step of a group's curves is: PPO logs once a rollout, the monitors count optimizer steps.

    Example:
        >>> step_unit("objective", "PPO"), step_unit("goodhart", "PPO"), step_unit("", "DPO")
        ('rollouts', 'optimizer steps', 'optimizer steps')
    """
    return "rollouts" if algorithm == "PPO" and group not in MONITORS else "optimizer steps"


def picture(panel: Panel, group: str, unit: str) -> Element:
    """A panel: group, title and unit, the chart, a legend where there are several lines, and a sentence."""
    words = meaning(panel.name)
    styles = {"train": "a", "": "a", "val": "b", "test": "fit"}
    lines = [
        _line(stage, styles[stage], curve, panel.bands.get(stage)) for stage, curve in panel.curves.items()
    ]
    lines = [line for line in lines if any(math.isfinite(y) for y in line.y)]
    longest = max(len(line.x) for line in lines)
    per_point = -(-longest // MAX_POINTS)
    thinned = f" Each point is the mean of {per_point} values, the band their range." if per_point > 1 else ""
    banded = " The band is its interval." if panel.bands else ""
    legend = element(
        "div", *(element("span", line.label, class_=line.style) for line in lines), class_="legend"
    )
    return element(
        "figure",
        element("p", group, class_="group"),
        element("h5", words.title, " ", element("small", f"({words.unit})")),
        legend if len(lines) > 1 or lines[0].style == "b" else None,
        draw(Chart(lines=lines, x_label=unit, title=f"{words.title} over {unit}")),
        element("figcaption", words.sentence + banded + thinned + " ", element("code", panel.name)),
    )


def _line(stage: str, style: str, curve: Curve, band: tuple[Curve, Curve] | None) -> Line:
    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()
    if band is not None:
        ends = [dict(zip(end.steps, end.values, strict=True)) for end in band]
        lower, upper = (tuple(end.get(step, math.nan) for step in curve.steps) for end in ends)
    names = {"train": "training", "val": "validation", "test": "test", "": "logged"}
    dots = finite_points(curve) <= 40
    return Line(
        label=names[stage], style=style, x=curve.steps, y=curve.values, lower=lower, upper=upper, dots=dots
    )
