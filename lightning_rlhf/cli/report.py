"""The quickstart's report: a table, a picture, and the samples they come from."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lightning_rlhf.cli.measure import Divergence, standard_error
from lightning_rlhf.cli.ordering import Ordering

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is reported of one stage: of a policy its samples, of a reward model how it orders pairs.

    Attributes:
        stage: Its name.
        seconds: Of training.
        gold: Gold reward of each sample, one a held-out prompt, the same prompts for every stage.
        divergence: From the SFT model; None for what is no model.
        win_rate: Share of prompts with a higher gold reward than the SFT model's sample, ties as half.
        mean_length: Tokens a completion, its end token included.
        malformed: Share of samples that break the language's rules.
        truncated: Share of samples that were cut off.
        ordering: Of held-out pairs by a reward model.
        curve: Logged value by step: ``name``, ``unit`` of the steps, ``steps``, ``values``.
    """

    stage: str
    seconds: float | None = None
    gold: list[float] | None = None
    divergence: Divergence | None = None
    win_rate: float | None = None
    mean_length: float | None = None
    malformed: float | None = None
    truncated: float | None = None
    ordering: Ordering | None = None
    curve: dict[str, Any] | None = None

    def cells(self) -> list[str]:
        """The row as words, under :data:`COLUMNS`; what was not measured is empty."""
        kl, ordering = self.divergence, self.ordering
        return [
            self.stage,
            "" if self.gold is None else f"{mean(self.gold):.2f} ± {standard_error(self.gold):.2f}",
            "" if kl is None else f"{kl.kl:.2f} ± {kl.error:.2f}",
            "" if kl is None else f"{kl.k1:.2f}, {kl.k3:.2f}",
            "" if self.win_rate is None else f"{self.win_rate:.0%}",
            "" if self.mean_length is None else f"{self.mean_length:.1f}",
            "" if self.malformed is None else f"{self.malformed:.1%}",
            "" if self.truncated is None else f"{self.truncated:.1%}",
            ""
            if ordering is None
            else f"{ordering.accuracy:.1%} ({ordering.lower:.1%} to {ordering.upper:.1%})",
            "" if ordering is None else f"{ordering.best:.1%}",
            "" if ordering is None else f"{ordering.calibration_error:.3f}",
            "" if ordering is None else f"{ordering.length_correlation:+.2f}",
            "" if self.seconds is None else f"{self.seconds:.0f}",
        ]


COLUMNS = (
    "stage",
    "gold reward",
    "KL from SFT (nats)",
    "its k1, k3",
    "wins against SFT",
    "mean length",
    "malformed",
    "cut off",
    "pairs ordered right",
    "best reachable",
    "calibration error",
    "reward–length correlation",
    "seconds",
)
SHORT = {"KL from SFT (nats)": "KL (nats)", "wins against SFT": "wins", "mean length": "length"}
IN_TERMINAL = ("stage", "gold reward", *SHORT, "malformed", "cut off", "seconds")
SAMPLE_NOTES = (
    "{count} samples a policy, one for each held-out prompt, temperature 1. ± is one standard error. KL: the "
    "vocabulary summed out at every sampled token, summed over tokens, mean over samples; k1 and k3 are the usual "
    "estimates of it. Wins: higher gold reward on the same prompt, ties as half. Seconds: training only."
)
PAIR_NOTES = (
    " Pairs: {count:,} held-out ones, each compared once by an annotator, with a 95% interval (Wilson); preferring the "
    "longer answer is right on {longer:.1%}. The best reachable share is computed from the annotators' probabilities: "
    "they disagree."
)


def console_table(rows: list[Row]) -> Table:
    """The table for a terminal of 80 columns: the other columns are left to the report."""
    table = Table(title="quickstart", title_justify="left", padding=(0, 0, 0, 1))
    shown = [index for index, name in enumerate(COLUMNS) if name in IN_TERMINAL]
    for index in shown:
        table.add_column(SHORT.get(COLUMNS[index], COLUMNS[index]), justify="right" if index else "left")
    for row in rows:
        cells = row.cells()
        table.add_row(*(cells[index] for index in shown))
    return table


def markdown(rows: list[Row], seconds: float) -> str:
    """The table in Markdown, with what its numbers mean."""
    lines = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1), *(row.cells() for row in rows)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    notes = SAMPLE_NOTES.format(count=len(next(row.gold for row in rows if row.gold is not None)))
    for row in rows:
        if row.ordering is not None:
            notes += PAIR_NOTES.format(count=row.ordering.num_pairs, longer=row.ordering.longer_wins)
    return f"# Quickstart\n\n{table}\n\n{notes} The whole run took {seconds:.0f} seconds.\n\n![](quickstart.png)\n"


def write_report(folder: Path, rows: list[Row], samples: list[dict[str, Any]], seconds: float) -> None:
    """Write ``table.md``, ``table.json``, ``quickstart.png`` and ``samples.jsonl``.

    Args:
        folder: Exists.
        rows: One a stage.
        samples: One row a sample.
        seconds: Of the whole quickstart.
    """
    (folder / "table.md").write_text(markdown(rows, seconds))
    content = {"stages": [plain(row) for row in rows], "seconds": seconds}
    (folder / "table.json").write_text(json.dumps(content, indent=2) + "\n")
    with (folder / "samples.jsonl").open("w") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)
    draw(rows, folder / "quickstart.png")


def plain(row: Row) -> dict[str, Any]:
    """The row's numbers: of what there is one for each sample, the mean and its standard error."""
    content = {name: value for name, value in asdict(row).items() if name not in ("gold", "curve")}
    if row.gold is not None:
        error = standard_error(row.gold)
        content |= {"gold": mean(row.gold), "gold_error": error, "num_samples": len(row.gold)}
    return content


def draw(rows: list[Row], path: Path) -> None:
    """Learning curves beside the gold reward of every policy over its distance from SFT."""
    from matplotlib.figure import Figure

    curves = [row for row in rows if row.curve and row.curve["steps"]]
    across = min(3, len(curves) + 1)
    down = len(curves) // across + 1
    figure = Figure(figsize=(4.2 * across, 3.6 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, row in zip(axes, curves, strict=False):
        draw_curve(row, axis)
    draw_gold([row for row in rows if row.gold is not None], axes[len(curves)])
    for axis in axes[len(curves) + 1 :]:
        axis.remove()
    figure.savefig(path, dpi=130)


def draw_curve(row: Row, axis: "Axes") -> None:
    """A stage's learning curve; of a reward model with what it reached on held-out pairs and could have reached."""
    assert row.curve is not None
    steps, ordering = row.curve["steps"], row.ordering
    axis.plot(steps, row.curve["values"], alpha=1.0 if ordering is None else 0.4)
    if ordering is not None:
        bars = [[ordering.accuracy - ordering.lower], [ordering.upper - ordering.accuracy]]
        axis.axhline(ordering.best, linestyle=":", color="grey", label="best reachable")
        axis.errorbar(steps[-1:], [ordering.accuracy], yerr=bars, fmt="o", capsize=4, label="held-out pairs")
        axis.legend(loc="lower right")
    axis.set(title=row.stage, xlabel=row.curve["unit"], ylabel=row.curve["name"])
    axis.grid(alpha=0.3)


def draw_gold(rows: list[Row], axis: "Axes") -> None:
    """The gold reward of policies over their KL from SFT; what is no model is a line."""
    for row in rows:
        assert row.gold is not None
        height = mean(row.gold)
        if row.divergence is None:
            axis.axhline(height, linestyle=":", color="grey")
            axis.annotate(row.stage, (0, height), xytext=(2, 3), textcoords="offset points", color="grey")
        else:
            error = 1.96 * standard_error(row.gold)
            axis.errorbar(row.divergence.kl, height, yerr=error, marker="o", capsize=4, label=row.stage)
    axis.set(title="what was reached (95% intervals)", xlabel="KL from SFT, nats", ylabel="gold reward")
    axis.grid(alpha=0.3)
    axis.legend()
