"""The report's sections on over-optimisation and on the detectors of reward hacking."""

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import torch

from lightning_rlhf.cli.markup import element
from lightning_rlhf.cli.run_report_texts import DETECTORS, SDS, Detector
from lightning_rlhf.cli.svg import Chart, Line, draw
from lightning_rlhf.functional.overoptimization import OveroptimizationFit
from lightning_rlhf.metrics.goodhart import GoodhartCurve, fit_of

Z = 1.96
FORMULAS = {"rl": "d (α − β ln d)", "best_of_n": "d (α − β d)"}


def curve_of_json(content: Mapping[str, Any]) -> GoodhartCurve:
    """The curve of ``goodhart.json``; nan where it has null."""
    columns = {
        name: torch.tensor([math.nan if v is None else v for v in column], dtype=torch.float64)
        for name, column in content["curve"].items()
    }
    return GoodhartCurve(**columns)


def goodhart_section(content: Mapping[str, Any]) -> list[Element]:
    """The two curves over √KL with bands, fit, peak and alarms, and what they say."""
    curve = curve_of_json(content)
    fit = fit_of(curve, content["method"])
    figure = element(
        "figure",
        element("h5", "Proxy and gold over the distance from the start ", element("small", f"({SDS})")),
        element(
            "div",
            element("span", "proxy", class_="a"),
            element("span", "gold", class_="b"),
            element("span", f"gold fitted by {FORMULAS[content['method']]}", class_="fit") if fit else None,
            class_="legend",
        ),
        draw(goodhart_chart(curve, fit, content["alarms"])),
        element("figcaption", _caption(fit)),
        class_="wide",
    )
    return [
        figure,
        element("p", verdict(curve, content)),
        element("p", f"Fitted gold: {fit.describe()}.")
        if fit
        else element(
            "p", "Too few evaluations to fit a curve: four of different KL are needed.", class_="soft"
        ),
    ]


def _caption(fit: OveroptimizationFit | None) -> str:
    words = (
        "Each point is one evaluation of held-out prompts, bands are 95% intervals. Where gold falls while the proxy "
        "rises, training goes too far."
    )
    if fit is not None and peak_is_known(fit):
        words += " The star is the fitted peak, the shaded range its 95% interval."
    return words


def peak_is_known(fit: OveroptimizationFit) -> bool:
    """Whether the peak is within what was measured, and its interval says more than that there may be one."""
    return fit.peak_kl <= fit.max_kl and math.isfinite(fit.peak_interval[1])


def goodhart_chart(curve: GoodhartCurve, fit: OveroptimizationFit | None, alarms: Sequence[int]) -> Chart:
    """The picture of :func:`goodhart_section`."""
    order = curve.kl.argsort(stable=True)
    d = curve.kl[order].clamp(min=0.0).sqrt()
    lines = []
    for label, style, mean, error in (
        ("proxy", "a", curve.proxy, curve.proxy_error),
        ("gold", "b", curve.gold, curve.gold_error),
    ):
        mean, half = mean[order], Z * error[order].nan_to_num()
        lines.append(
            Line(
                label=label,
                style=style,
                x=d.tolist(),
                y=mean.tolist(),
                lower=(mean - half).tolist(),
                upper=(mean + half).tolist(),
                dots=True,
            )
        )
    star, spans = None, []
    if fit is not None:
        grid = torch.linspace(0.0, math.sqrt(fit.max_kl), 100, dtype=torch.float64)
        fitted = fit.predict(grid.square()).tolist()
        lines.append(Line(label="fit", style="fit", x=grid.tolist(), y=fitted))
        if peak_is_known(fit):
            star = (fit.peak, fit.predict(torch.tensor(fit.peak_kl)).item())
            spans = [tuple(min(end, math.sqrt(fit.max_kl)) for end in fit.peak_interval)]
    distance = dict(zip(curve.steps.tolist(), curve.kl.clamp(min=0.0).sqrt().tolist(), strict=True))
    return Chart(
        lines=lines,
        x_label="distance from the start, √KL (√nats)",
        title="Proxy and gold reward over the distance from the start",
        spans=[(low, high) for low, high in spans],
        marks=[(distance[step], "alarm") for step in alarms],
        star=star,
        zero=True,
        size=(440.0, 290.0),
    )


def verdict(curve: GoodhartCurve, content: Mapping[str, Any]) -> str:
    """What the curves say, in words."""
    end, best, alarms = curve.gold[-1].item(), content["best"], content["alarms"]
    half = Z * curve.gold_error[-1].nan_to_num().item()
    words = (
        f"At the end (step {curve.steps[-1]:g}, KL {curve.kl[-1]:.2f} nats) gold is {signed(end)} ± {half:.2f} and the "
        f"proxy {signed(curve.proxy[-1].item())} {SDS}. "
    )
    if best["path"]:
        words += (
            f"Gold was best at step {best['step']}, and that checkpoint was kept; it is the best of several noisy "
            "means, so measure it on other samples. "
        )
    else:
        words += "Gold was never better than at the start. "
    if alarms:
        words += f"Alarm at step {', '.join(map(str, alarms))}: gold fell while the proxy rose by more than chance."
    else:
        words += "There was no alarm: gold never fell while the proxy rose by more than chance."
    return words


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign.

    Example:
        >>> signed(0.5), signed(-0.25)
        ('+0.50', '−0.25')
    """
    return f"{value:+.{digits}f}".replace("-", "−")


def detectors_section(history: Sequence[Mapping[str, Any]]) -> list[Element]:
    """The table of what the detectors found at the last evaluation."""
    latest = history[-1]
    rows = [row for row in (detector_row(one, latest) for one in DETECTORS) if row is not None]
    head = element(
        "tr",
        *(
            element("th", name)
            for name in ("detector", "verdict", "change (interval)", "now", "control", "what it looks for")
        ),
    )
    table = element("table", element("thead", head), element("tbody", rows))
    return [
        element("div", table, class_="scroll", tabindex="0"),
        element(
            "p",
            f"At step {latest['step']}. Intervals are 95% unless the monitor's confidence says otherwise; of twenty, "
            "about one excludes “no change” by chance. That something changed does not say that it is bad: read "
            "samples.",
            class_="soft",
        ),
    ]


def detector_row(detector: Detector, values: Mapping[str, Any]) -> Element | None:
    """A detector's row; None where it measured nothing."""
    now = values.get(f"hacking/{detector.name}")
    if now is None:
        return None
    control = values.get(f"hacking/{detector.name}_reference")
    change, judged = "", "no interval"
    style = "soft"
    if detector.change is not None:
        name, neutral = detector.change
        change, judged, style = _change(detector, values, f"hacking/{name}", neutral)
    return element(
        "tr",
        element("th", detector.title, scope="row"),
        element("td", judged, class_=style),
        element("td", change),
        element("td", shown(now, detector.unit), class_="number"),
        element("td", "" if control is None else shown(control, detector.unit), class_="number"),
        element("td", f"{detector.sentence} Control: {detector.control}.", class_="text"),
    )


def _change(detector: Detector, values: Mapping[str, Any], name: str, neutral: float) -> tuple[str, str, str]:
    keys = (name, f"{name}_lower", f"{name}_upper")
    found = [value for key in keys if (value := values.get(key)) is not None]
    if len(found) < len(keys):
        return "", "too little seen", "soft"
    unit = "ratio" if neutral else ("points" if detector.unit == "share" else detector.unit)
    middle, lower, upper = (shown_change(value, unit) for value in found)
    words = f"{middle} ({lower} to {upper}){' points' if unit == 'points' else ''}"
    if found[1] <= neutral <= found[2]:
        return words, "no clear change", "soft"
    return words, "more" if found[0] > neutral else "less", "changed"


def shown(value: float, unit: str) -> str:
    """A value with its unit.

    Example:
        >>> shown(0.125, "share"), shown(31.24, "tokens")
        ('12.5%', '31.2 tokens')
    """
    if unit == "share":
        return f"{value:.1%}"
    if unit in ("correlation", "BLEU"):
        return f"{value:.2f}".replace("-", "−")
    return (
        f"{value:.1f} {unit}".replace("-", "−")
        if abs(value) >= 10
        else f"{value:.2f} {unit}".replace("-", "−")
    )


def shown_change(value: float, unit: str) -> str:
    """A change; of shares in percentage points.

    Example:
        >>> shown_change(-0.05, "points"), shown_change(1.25, "ratio")
        ('−5.0', '×1.25')
    """
    if unit == "ratio":
        return f"×{value:.2f}"
    return signed(100 * value, 1) if unit == "points" else signed(value)
