"""The quickstart's table and its samples in the report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from lightning_rlhf.cli.markup import element
from lightning_rlhf.cli.run_report_samples import Column, samples_section


def quickstart_section(report: Path) -> Element | None:
    """What a quickstart measured, stage by stage; None for a folder that is none's.

    Args:
        report: The folder that the quickstart writes.
    """
    table, samples = report / "table.json", report / "samples.jsonl"
    if not table.is_file() or not samples.is_file():
        return None
    stages = json.loads(table.read_text())["stages"]
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    head = (
        "stage",
        "gold reward (± one standard error)",
        "KL from SFT",
        "wins against SFT",
        "mean length",
        "pairs ordered right",
        "training",
    )
    return element(
        "section",
        element("h2", "What the quickstart measured"),
        element(
            "div",
            element(
                "table",
                element("thead", element("tr", *(element("th", word) for word in head))),
                element("tbody", *(_row(stage) for stage in stages)),
            ),
            class_="scroll",
            tabindex="0",
        ),
        element(
            "p",
            "On held-out prompts, the same for every policy; see report/table.md for what each number means.",
            class_="soft",
        ),
        element("h3", "Samples of the stages side by side"),
        *samples_section(_columns(rows), count=3),
    )


def _row(stage: Mapping[str, Any]) -> Element:
    divergence, ordering = stage.get("divergence"), stage.get("ordering")
    cells = [
        "" if stage.get("gold") is None else f"{stage['gold']:.2f} ± {stage['gold_error']:.2f}",
        "" if divergence is None else f"{divergence['kl']:.2f} nats",
        "" if stage.get("win_rate") is None else f"{stage['win_rate']:.0%}",
        "" if stage.get("mean_length") is None else f"{stage['mean_length']:.1f} tokens",
        ""
        if ordering is None
        else f"{ordering['accuracy']:.1%} ({ordering['lower']:.1%} to {ordering['upper']:.1%})",
        "" if stage.get("seconds") is None else f"{stage['seconds']:.0f} s",
    ]
    numbers = [element("td", cell.replace("-", "−"), class_="number") for cell in cells]
    return element("tr", element("th", stage["stage"], scope="row"), numbers)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    found = []
    for stage in stages:
        own = [row for row in rows if row["stage"] == stage]
        texts = {row["prompt"]: row["completion"] for row in own}
        numbers = {row["prompt"]: f"gold {row['gold']:.2f}".replace("-", "−") for row in own}
        found.append(Column(stage, texts, numbers))
    return found
