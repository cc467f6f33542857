"""What runs that were watched by GoodhartMonitor show together: a table, and two panels."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.callbacks.held_out import without_rest
from lightning_rlhf.functional.student_t import student_t_quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Color = tuple[float, float, float]
Z = 1.96


@dataclass(frozen=True)
class Run:
    """One training: T evaluations of P_t prompts each, which may differ; the first is of the starting policy.

    Attributes:
        setting: What was done against over-optimisation.
        coef: The KL coefficient.
        seed: Of the run.
        kl: KL from the start in nats, T times ``(P_t,)``, float64.
        proxy: What was maximised, likewise.
        gold: What it stands for, likewise.
        alarm: The evaluation at which the monitor first gave an alarm; None where it gave none.
    """

    setting: str
    coef: float
    seed: int
    kl: Sequence[Tensor]
    proxy: Sequence[Tensor]
    gold: Sequence[Tensor]
    alarm: int | None = None


def read_run(setting: str, coef: float, seed: int, folder: Path) -> Run:
    """A run from what its monitor wrote: ``evaluations.json`` and ``goodhart.json`` in a folder.

    What was left of the rollouts at the end is left out, as the monitor leaves it out where it looks for the best.
    """
    history = without_rest(json.loads((folder / "evaluations.json").read_text()))
    alarms = json.loads((folder / "goodhart.json").read_text())["alarms"]
    kl, proxy, gold = (
        [torch.tensor(one[name], dtype=torch.float64) for one in history] for name in ("kl", "proxy", "gold")
    )
    places = [place for place, one in enumerate(history) if one["step"] in alarms]
    return Run(setting, coef, seed, kl, proxy, gold, places[0] if places else None)


class Outcome(NamedTuple):
    """What one run came to.

    Attributes:
        best: Gold gained over the start where it is best. An evaluation is chosen on the prompts of even places and
            measured on the others, another the other way round: the mean of both.
        best_error: Its standard error.
        best_kl: KL there, in nats, likewise.
        missed: By how much another evaluation was better where they were measured, less what its 95% interval allows
            for; 0 where what was chosen is within the interval of the best.
        alarm_kl: KL at the monitor's first alarm; infinite where there was none.
        alarm: Gold gained over the start there; nan where there was none.
        lost_kl: KL at the first evaluation, after the one with the most gold on all prompts, at which gold is below the
            start by more than its 95% interval; infinite where there is none.
        end: Gold gained over the start at the end.
        end_error: Its standard error.
        end_proxy: The proxy's gain at the end.
        end_kl: KL at the end.
    """

    best: float
    best_error: float
    best_kl: float
    missed: float
    alarm_kl: float
    alarm: float
    lost_kl: float
    end: float
    end_error: float
    end_proxy: float
    end_kl: float

    @property
    def kept_until(self) -> float:
        """KL at which gold was lost, or else at the end."""
        return self.lost_kl if math.isfinite(self.lost_kl) else self.end_kl


def outcome(run: Run) -> Outcome:
    """What a run came to; see :class:`Outcome`.

    Example:
        >>> gold = [torch.full((8,), value, dtype=torch.float64) for value in (0.0, 2.0, -9.0)]
        >>> kl = [torch.full((8,), value, dtype=torch.float64) for value in (0.0, 1.0, 2.0)]
        >>> outcome(Run("plain", 0.0, 0, kl, kl, gold))
        Outcome(best=2.0, best_error=0.0, best_kl=1.0, missed=0.0, alarm_kl=inf, alarm=nan, lost_kl=2.0, end=-9.0, ...)
    """
    gains, errors = _gains(run.gold)
    kl = means_and_errors(run.kl)[0]
    proxy = means_and_errors(run.proxy)[0]
    halves = [_best_of_half(run.gold, half) for half in (0, 1)]
    lost = (gains < -Z * errors) & (torch.arange(len(gains)) > int(gains.argmax()))
    return Outcome(
        sum(half.gain for half in halves) / 2,
        math.hypot(*(half.error for half in halves)) / 2,
        sum(kl[half.place].item() for half in halves) / 2,
        max(half.missed for half in halves),
        math.inf if run.alarm is None else kl[run.alarm].item(),
        math.nan if run.alarm is None else gains[run.alarm].item(),
        kl[int(lost.int().argmax())].item() if lost.any() else math.inf,
        gains[-1].item(),
        errors[-1].item(),
        (proxy[-1] - proxy[0]).item(),
        kl[-1].item(),
    )


class _Best(NamedTuple):
    place: int
    gain: float
    error: float
    missed: float


def _best_of_half(gold: Sequence[Tensor], half: int) -> _Best:
    """The best evaluation by every second prompt, measured on those between."""
    place = int(means_and_errors([row[half::2] for row in gold])[0].argmax())
    others = [row[1 - half :: 2] for row in gold]
    means, errors = means_and_errors(others)
    gains, gain_errors = _gains(others)
    missed = (means - means[place]) - Z * (errors.square() + errors[place].square()).sqrt()
    return _Best(place, gains[place].item(), gain_errors[place].item(), max(0.0, missed.max().item()))


def _gains(gold: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What each evaluation gained over the first, and its standard error."""
    means, errors = means_and_errors(gold)
    return means - means[0], (errors.square() + errors[0].square()).sqrt()


def means_and_errors(evaluations: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and its standard error of each evaluation, over its prompts."""
    means = torch.stack([row.mean() for row in evaluations])
    return means, torch.stack([row.std() / len(row) ** 0.5 for row in evaluations])


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half of its 95% interval (Student); nan for a single one.

    Example:
        >>> [round(value, 3) for value in mean_and_interval([1.0, 2.0, 3.0])]
        [2.0, 2.484]
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, student_t_quantile(0.975, len(values) - 1) * math.sqrt(variance / len(values))


def grouped(runs: Sequence[Run]) -> dict[tuple[str, float], list[Run]]:
    """Runs that differ in their seed only, in the order given."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        found.setdefault((run.setting, run.coef), []).append(run)
    return found


COLUMNS = (
    "setting",
    "KL coefficient",
    "seeds",
    "gold gained at its best",
    "by more than chance",
    "more than the first row",
    "KL there (nats)",
    "alarms",
    "KL there (nats)",
    "gold gained there",
    "half of the best or more",
    "gold below its start",
    "KL there (nats)",
    "later than the first row",
    "gold gained at the end",
    "proxy gained at the end",
    "KL at the end (nats)",
)


def markdown(runs: Sequence[Run]) -> str:
    """A table with a row a setting and coefficient, and what its numbers mean."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1))]
    first: dict[int, Outcome] = {}
    for (setting, coef), several in grouped(runs).items():
        by_seed = {run.seed: outcome(run) for run in several}
        found = list(by_seed.values())
        first = first or by_seed
        pairs = [
            (one, first[seed]) for seed, one in by_seed.items() if seed in first and first is not by_seed
        ]
        lost = [one.lost_kl for one in found if math.isfinite(one.lost_kl)]
        alarmed = [one for one in found if math.isfinite(one.alarm_kl)]
        kept = sum(one.alarm >= max(one.best, 0.0) / 2 for one in alarmed)
        fallen = [(one, other) for one, other in pairs if math.isfinite(other.lost_kl)]
        later = sum(one.kept_until > other.lost_kl for one, other in fallen)
        cells = [
            setting.replace("|", r"\|"),
            f"{coef:g}",
            str(len(several)),
            _cell([one.best for one in found]),
            f"{sum(one.best > Z * one.best_error for one in found)} of {len(found)}",
            _cell([one.best - other.best for one, other in pairs]),
            _cell([one.best_kl for one in found]),
            f"{len(alarmed)} of {len(found)}",
            _cell([one.alarm_kl for one in alarmed]),
            _cell([one.alarm for one in alarmed]),
            f"{kept} of {len(alarmed)}" if alarmed else "",
            f"{len(lost)} of {len(found)}",
            _cell(lost),
            f"{later} of {len(fallen)}" if fallen else "",
            _cell([one.end for one in found]),
            _cell([one.end_proxy for one in found]),
            _cell([one.end_kl for one in found]),
        ]
        lines.append(tuple(cells))
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    notes = (
        "± is half of a 95% interval over seeds (Student). The best evaluation of a run is chosen on half of the "
        "prompts and measured on the other half, and the other way round. By more than chance: by more than the 95% "
        "interval of the run's own prompts. More than the first row: seed by seed. Half of the best or more: how many "
        "of the first alarms came while gold was at least half of that above its start. Gold is below its start where "
        "the difference is below 0 by more than its 95% interval, after the evaluation with the most gold. Later than "
        "the first row: of the seeds that fell there, those that fell at a larger KL here or ended at a larger one "
        "without falling; what ended nearer is not counted, even if it never fell."
    )
    return f"{table}\n\n{notes}\n"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, half = mean_and_interval(values)
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def draw(runs: Sequence[Run]) -> "Figure":
    """Both panels: the curves over √KL at the lowest coefficient, and what is reached over the coefficient."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    settings = list(dict.fromkeys(run.setting for run in runs))
    colors = colormaps["tab10" if len(settings) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for setting, color in zip(settings, itertools.cycle(colors), strict=False):
        own = [run for run in runs if run.setting == setting]
        lowest = min(run.coef for run in own)
        _draw_curve(left, [run for run in own if run.coef == lowest], setting, color)
        _draw_ends(right, own, setting, color)
    left.set(
        title="along the run, at the lowest KL coefficient",
        xlabel="distance from the start, √KL (√nats)",
        ylabel="gained over the start",
    )
    right.set(title="at the end", xlabel="KL coefficient", ylabel="gained over the start")
    coefs = sorted({run.coef for run in runs})
    smallest = min((coef for coef in coefs if coef > 0), default=1.0)
    right.set_xscale("symlog", linthresh=smallest)
    right.set_xticks(coefs, [f"{coef:g}" for coef in coefs])
    for axis in (left, right):
        axis.axhline(0.0, color="grey", linewidth=0.8, zorder=0)
        axis.grid(alpha=0.3)
    left.plot([], [], "-", color="black", label="gold")
    left.plot([], [], ":", color="black", label="proxy")
    left.legend(fontsize="small", frameon=False)
    return figure


def _draw_curve(axis: "Axes", runs: Sequence[Run], label: str, color: Color) -> None:
    """Means over seeds, evaluation by evaluation, gold with a 95% band."""
    length = min(len(run.kl) for run in runs)
    kl, gold, proxy = (
        torch.stack([means_and_errors(values[:length])[0] for values in several])
        for several in ([run.kl for run in runs], [run.gold for run in runs], [run.proxy for run in runs])
    )
    d = kl.clamp(min=0).sqrt().mean(0)
    gold, proxy = gold - gold[:, :1], proxy - proxy[:, :1]
    bands = [mean_and_interval(column.tolist()) for column in gold.T]
    means = torch.tensor([mean for mean, _ in bands])
    halves = torch.tensor([half for _, half in bands]).nan_to_num()
    axis.plot(d.numpy(), means.numpy(), "-", color=color, label=label)
    axis.fill_between(d.numpy(), (means - halves).numpy(), (means + halves).numpy(), color=color, alpha=0.15)
    axis.plot(d.numpy(), proxy.mean(0).numpy(), ":", color=color)


def _draw_ends(axis: "Axes", runs: Sequence[Run], label: str, color: Color) -> None:
    by_coef = {
        coef: several for (_, coef), several in sorted(grouped(runs).items(), key=lambda item: item[0][1])
    }
    ends = {coef: [outcome(run) for run in several] for coef, several in by_coef.items()}
    for style, marker, values in (
        ("-", "o", [mean_and_interval([one.end for one in found]) for found in ends.values()]),
        (":", "s", [mean_and_interval([one.end_proxy for one in found]) for found in ends.values()]),
    ):
        errors = [0.0 if math.isnan(half) else half for _, half in values]
        axis.errorbar(
            list(ends),
            [mean for mean, _ in values],
            yerr=errors,
            fmt=marker,
            linestyle=style,
            color=color,
            markersize=4,
            capsize=3,
            label=label if style == "-" else None,
        )
