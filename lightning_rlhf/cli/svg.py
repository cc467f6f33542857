"""Line charts as SVG whose colours are the page's: classes, no colours of their own."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from statistics import fmean as mean
from typing import NamedTuple
from xml.etree.ElementTree import Element

from lightning_rlhf.cli.markup import element

MAX_POINTS = 400
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 36.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart.

    Attributes:
        label: Its name.
        style: Its class: ``a``, ``b`` or ``fit``.
        x: Where its points are, ascending.
        y: Their values; what is not finite is a gap.
        lower: The lower end of a band; empty without one.
        upper: The upper end.
        dots: Whether each point has one.
    """

    label: str
    style: str
    x: Sequence[float]
    y: Sequence[float]
    lower: Sequence[float] = ()
    upper: Sequence[float] = ()
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn.

    Attributes:
        lines: At least one, with a finite point.
        x_label: Of the horizontal axis, with its unit.
        title: For who cannot see it.
        spans: From and to along the horizontal axis: shaded.
        marks: Along the horizontal axis: a dashed line with a name.
        star: A point to be seen.
        zero: Draw a line at 0.
        size: Width and height.
    """

    lines: Sequence[Line]
    x_label: str
    title: str
    spans: Sequence[tuple[float, float]] = ()
    marks: Sequence[tuple[float, str]] = ()
    star: tuple[float, float] | None = None
    zero: bool = False
    size: tuple[float, float] = field(default=(340.0, 200.0))


class _Scale(NamedTuple):
    ticks: list[float]
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def thinned(line: Line, count: int = MAX_POINTS) -> Line:
    """A line of at most ``count`` points: means of neighbours, in a band from the least to the greatest of them.

    Example:
        >>> fewer = thinned(Line(label="", style="a", x=range(6), y=[0, 2, 4, 6, 8, 10]), 3)
        >>> fewer.x, fewer.y, fewer.lower
        ([0.5, 2.5, 4.5], [1.0, 5.0, 9.0], [0, 4, 8])
    """
    if len(line.x) <= count:
        return line
    size = -(-len(line.x) // count)
    starts = range(0, len(line.x), size)
    x, y, lower, upper = (
        [list(column[start : start + size]) for start in starts]
        for column in (line.x, line.y, line.lower or line.y, line.upper or line.y)
    )
    return replace(
        line,
        x=[sum(several) / len(several) for several in x],
        y=[_over_finite(mean, several) for several in y],
        lower=[_over_finite(min, several) for several in lower],
        upper=[_over_finite(max, several) for several in upper],
        dots=False,
    )


def _over_finite(how: Callable[[list[float]], float], values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return how(finite) if finite else math.nan


def draw(chart: Chart) -> Element:
    """The chart as an ``svg`` element.

    Raises:
        ValueError: If it has no finite point.
    """
    lines = [thinned(line) for line in chart.lines]
    width, height = chart.size
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for several in (line.y, line.lower, line.upper) for y in several]
    ys += [0.0] * chart.zero
    x = _scale(xs, LEFT, width - RIGHT, tight=True)
    y = _scale(ys, height - BOTTOM, TOP)
    return element(
        "svg",
        element("title", chart.title),
        _axes(chart, x, y),
        *(_span(x, y, *span) for span in chart.spans),
        *(_line(line, x, y) for line in lines),
        *(_mark(x, y, *mark) for mark in chart.marks),
        None if chart.star is None else _star(x(chart.star[0]), y(chart.star[1])),
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
    )


def _scale(values: Sequence[float], start: float, end: float, *, tight: bool = False) -> _Scale:
    from matplotlib.ticker import MaxNLocator

    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        raise ValueError("a chart needs a finite point")
    low, high = min(finite), max(finite)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    margin = 0.0 if tight else 0.05 * (high - low)
    low, high = low - margin, high + margin
    ticks = [float(tick) for tick in MaxNLocator(nbins=5).tick_values(low, high) if low <= tick <= high]
    return _Scale(ticks, low, high, start, end)


def _axes(chart: Chart, x: _Scale, y: _Scale) -> Element:
    width, height = chart.size
    parts = []
    for tick in y.ticks:
        style = "zero" if chart.zero and tick == 0 else "grid"
        parts.append(element("line", class_=style, x1=LEFT, x2=width - RIGHT, y1=y(tick), y2=y(tick)))
        parts.append(element("text", label_of(tick), x=LEFT - 6, y=y(tick) + 4, text_anchor="end"))
    for tick in x.ticks:
        parts.append(element("text", label_of(tick), x=x(tick), y=height - BOTTOM + 15, text_anchor="middle"))
    parts.append(
        element("text", chart.x_label, x=(LEFT + width - RIGHT) / 2, y=height - 4, text_anchor="middle")
    )
    return element("g", parts, class_="axes")


def label_of(value: float) -> str:
    """A tick's number, short.

    Example:
        >>> [label_of(v) for v in (0.0, -0.25, 20000.0, 1.5e7, 1e-5)]
        ['0', '−0.25', '20k', '15M', '1e−05']
    """
    size, sign = next((s for s in ((1e6, "M"), (1e3, "k")) if abs(value) >= 10 * s[0]), (1.0, ""))
    return f"{value / size:.4g}".replace("-", "−") + sign


def _line(line: Line, x: _Scale, y: _Scale) -> Element:
    parts = []
    for run in _finite_runs(line.lower, line.upper):
        up = [(x(line.x[i]), y(line.upper[i])) for i in run]
        down = [(x(line.x[i]), y(line.lower[i])) for i in reversed(run)]
        parts.append(element("path", class_="band", d=_path(up + down) + "Z"))
    for run in _finite_runs(line.y):
        points = [(x(line.x[i]), y(line.y[i])) for i in run]
        parts.append(element("path", class_="line", d=_path(points)))
        if line.dots or len(points) == 1:
            parts += [element("circle", cx=cx, cy=cy, r=2.5) for cx, cy in points]
    return element("g", parts, class_=line.style)


def _finite_runs(*columns: Sequence[float]) -> Iterator[list[int]]:
    """Neighbouring places at which every column is finite."""
    finite = [all(map(math.isfinite, values)) for values in zip(*columns, strict=True)]
    for is_finite, places in groupby(range(len(finite)), key=finite.__getitem__):
        if is_finite:
            yield list(places)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)


def _span(x: _Scale, y: _Scale, low: float, high: float) -> Element:
    low, high = max(low, x.low), min(high, x.high)
    return element(
        "rect", class_="span", x=x(low), y=y.end, width=max(0.0, x(high) - x(low)), height=y.start - y.end
    )


def _mark(x: _Scale, y: _Scale, place: float, label: str) -> Element:
    at = x(place)
    left = at > (x.start + x.end) / 2
    return element(
        "g",
        element("line", x1=at, x2=at, y1=y.end, y2=y.start),
        element(
            "text", label, x=at + (-4 if left else 4), y=y.end + 10, text_anchor="end" if left else "start"
        ),
        class_="mark",
    )


def _star(cx: float, cy: float) -> Element:
    points = []
    for place in range(10):
        radius, angle = (7.0, 3.0)[place % 2], math.pi * (place / 5 - 0.5)
        points.append(f"{cx + radius * math.cos(angle):.1f},{cy + radius * math.sin(angle):.1f}")
    return element("polygon", class_="star", points=" ".join(points))
