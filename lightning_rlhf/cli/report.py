"""The quickstart's report: a table, a picture, and the samples they come from."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_rlhf.cli.measure import Divergence, standard_error


@dataclass(frozen=True)
class Row:
    """What is reported of one stage.

    Attributes:
        stage: Its name.
        gold: Gold reward of each sample, one a held-out prompt, the same prompts for every stage.
        divergence: From the SFT model; None for what is no model.
        win_rate: Share of prompts with a higher gold reward than the SFT model's sample, ties as half.
        mean_length: Tokens a completion, its end token included.
        malformed: Share of samples that break the language's rules.
        truncated: Share of samples that were cut off.
        seconds: Of training.
        curve: Logged value by step: ``name``, ``steps``, ``values``.
    """

    stage: str
    gold: list[float]
    divergence: Divergence | None
    win_rate: float | None
    mean_length: float
    malformed: float
    truncated: float
    seconds: float | None
    curve: dict[str, Any] | None = field(default=None)

    @property
    def mean_gold(self) -> float:
        """The mean gold reward."""
        return sum(self.gold) / len(self.gold)

    def cells(self) -> list[str]:
        """The row as words, under :data:`COLUMNS`."""
        kl, win, seconds = self.divergence, self.win_rate, self.seconds
        return [
            self.stage,
            f"{self.mean_gold:.2f} ± {standard_error(self.gold):.2f}",
            "" if kl is None else f"{kl.kl:.2f} ± {kl.error:.2f}",
            "" if kl is None else f"{kl.k1:.2f}, {kl.k3:.2f}",
            "" if win is None else f"{win:.0%}",
            f"{self.mean_length:.1f}",
            f"{self.malformed:.1%}",
            f"{self.truncated:.1%}",
            "" if seconds is None else f"{seconds:.0f}",
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
    "seconds",
)
SHORT = {"KL from SFT (nats)": "KL (nats)", "wins against SFT": "wins", "mean length": "length"}
NOTES = (
    "{count} samples a stage, one for each held-out prompt, temperature 1. ± is one standard error. KL: the vocabulary "
    "summed out at every sampled token, summed over tokens, mean over samples; k1 and k3 are the usual estimates of "
    "it. Wins: higher gold reward on the same prompt, ties as half. Seconds: training only."
)


def console_table(rows: list[Row]) -> Table:
    """The table for a terminal of 80 columns: the estimates k1 and k3 are left to the report."""
    table = Table(title="quickstart", title_justify="left", padding=(0, 0, 0, 1))
    shown = [index for index, name in enumerate(COLUMNS) if name != "its k1, k3"]
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
    notes = NOTES.format(count=len(rows[0].gold))
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
    plain = [
        {
            **{name: value for name, value in asdict(row).items() if name not in ("gold", "curve")},
            "gold": row.mean_gold,
            "gold_error": standard_error(row.gold),
            "num_samples": len(row.gold),
        }
        for row in rows
    ]
    (folder / "table.json").write_text(json.dumps({"stages": plain, "seconds": seconds}, indent=2) + "\n")
    with (folder / "samples.jsonl").open("w") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)
    draw(rows, folder / "quickstart.png")


def draw(rows: list[Row], path: Path) -> None:
    """Learning curves beside the gold reward of every stage over its distance from SFT."""
    from matplotlib.figure import Figure

    curves = [row for row in rows if row.curve]
    figure = Figure(figsize=(4.2 * (len(curves) + 1), 3.6), layout="constrained")
    axes = figure.subplots(1, len(curves) + 1)
    for axis, row in zip(axes, curves, strict=False):
        assert row.curve is not None
        axis.plot(row.curve["steps"], row.curve["values"])
        axis.set(title=row.stage, xlabel="optimizer step", ylabel=row.curve["name"])
        axis.grid(alpha=0.3)
    last = axes[-1]
    for row in rows:
        error = 1.96 * standard_error(row.gold)
        if row.divergence is None:
            last.axhline(row.mean_gold, linestyle=":", color="grey")
            last.annotate(
                row.stage, (0, row.mean_gold), xytext=(2, 3), textcoords="offset points", color="grey"
            )
        else:
            last.errorbar(
                row.divergence.kl, row.mean_gold, yerr=error, marker="o", capsize=4, label=row.stage
            )
    last.set(title="what was reached (95% intervals)", xlabel="KL from SFT, nats", ylabel="gold reward")
    last.grid(alpha=0.3)
    last.legend()
    figure.savefig(path, dpi=130)
