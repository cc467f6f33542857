"""The picture of over-optimisation: proxy and gold over √KL, the fit and the peak."""

import math
from typing import TYPE_CHECKING

import torch

from lightning_rlhf.functional.overoptimization import OveroptimizationFit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_rlhf.metrics.goodhart import GoodhartCurve

__all__ = ["draw"]

PROXY, GOLD = "#4477aa", "#cc8800"
_BAND = 1.96


def draw(
    curve: "GoodhartCurve", fit: OveroptimizationFit | None, ax: "Axes | None" = None
) -> "tuple[Figure | None, Axes]":
    """Draw a curve.

    Args:
        curve: What was measured.
        fit: Of its gold; None leaves it out.
        ax: Where to draw; by default a figure of its own.

    Returns:
        The figure, which is None where ``ax`` was given, and the axes.
    """
    from matplotlib.figure import Figure

    figure = None
    if ax is None:  # not by pyplot, which would keep every figure of a run
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        ax = figure.add_subplot()
    order = curve.kl.argsort(stable=True)
    d = curve.kl[order].clamp(min=0.0).sqrt()
    for name, color, mean, error in (
        ("proxy", PROXY, curve.proxy, curve.proxy_error),
        ("gold", GOLD, curve.gold, curve.gold_error),
    ):
        mean, half = mean[order], _BAND * error[order].nan_to_num()
        ax.plot(d.numpy(), mean.numpy(), "o-", color=color, markersize=3, linewidth=1.2, label=name)
        ax.fill_between(d.numpy(), (mean - half).numpy(), (mean + half).numpy(), color=color, alpha=0.2)
    if fit is not None:
        _draw_fit(ax, fit)
    ax.axhline(0.0, color="grey", linewidth=0.8, zorder=0)
    ax.set(xlabel="distance from the start, √KL (√nats)", ylabel="reward (standard deviations at the start)")
    ax.set_xlim(left=0.0)
    ax.margins(x=0.02)
    ax.legend(loc="best", frameon=False)
    return figure, ax


def _draw_fit(ax: "Axes", fit: OveroptimizationFit) -> None:
    d = torch.linspace(0.0, math.sqrt(fit.max_kl), 200)
    formula = "d (α − β ln d)" if fit.method == "rl" else "d (α − β d)"
    values = fit.predict(d.square())
    ax.plot(d.numpy(), values.numpy(), "--", color="black", linewidth=1, label=f"gold fitted by {formula}")
    ax.set_title(_title(fit), fontsize="medium")
    if fit.peak_kl <= fit.max_kl:
        top = fit.predict(torch.tensor(fit.peak_kl)).item()
        low, high = (min(end, math.sqrt(fit.max_kl)) for end in fit.peak_interval)
        ax.axvspan(low, high, color="black", alpha=0.06, linewidth=0)
        ax.plot([fit.peak], [top], "k*", markersize=10, label=f"peak at KL {fit.peak_kl:.3g}")


def _title(fit: OveroptimizationFit) -> str:
    said = fit.describe()
    return said if math.isfinite(fit.peak) else "no peak: the fitted gold reward does not turn down"
