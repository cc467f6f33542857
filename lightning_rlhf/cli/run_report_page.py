"""The page that ``lightning-rlhf report`` writes: HTML and nothing else, no script, nothing from elsewhere."""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from xml.etree.ElementTree import Element

from lightning_rlhf.cli.markup import element, page_text
from lightning_rlhf.cli.run_facts import versions
from lightning_rlhf.cli.run_logs import Curve, last_finite
from lightning_rlhf.cli.run_report import Run
from lightning_rlhf.cli.run_report_curves import curves_section, meaning, step_unit
from lightning_rlhf.cli.run_report_hacking import detectors_section, goodhart_section, signed
from lightning_rlhf.cli.run_report_quickstart import quickstart_section
from lightning_rlhf.cli.run_report_samples import sample_columns, samples_section
from lightning_rlhf.cli.run_report_style import STYLE

HEADLINES = (
    "loss",
    "objective/scores",
    "accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "objective/kl",
    "kl",
    "completions/mean_length",
    "mean_token_accuracy",
)
ABSENT = {
    "goodhart": "over-optimisation curves: add a GoodhartMonitor to trainer.callbacks, with a gold reward",
    "hacking": "detectors of reward hacking: add a HackingMonitor to trainer.callbacks",
    "samples": "samples: add a GoodhartMonitor, or SampleTable where the module samples in validation (PPO, OnlineDPO)",
    "curves": "logged values: train with a CSVLogger",
    "configuration": "configuration: `lightning-rlhf fit` keeps it beside the logs",
    "date": "date: `lightning-rlhf fit` records it; of another training only the files' times are known",
    "seconds": "duration: add lightning.pytorch.callbacks.Timer and keep a checkpoint",
    "versions": "versions of the run: `lightning-rlhf fit` records them",
}


def page(folder: Path, runs: Sequence[Run]) -> str:
    """The whole document.

    Args:
        folder: What was asked about.
        runs: At least one, in their order.
    """
    name = folder.resolve().name
    body = element(
        "body",
        element(
            "header",
            element("h1", f"Run report: {name}"),
            element("p", f"{folder}, drawn {moment(datetime.now().astimezone())}", class_="soft"),
        ),
        element(
            "main",
            quickstart_section(folder / "report"),
            overview(runs) if len(runs) > 1 else None,
            *(run_section(run, place, name) for place, run in enumerate(runs)),
        ),
        element(
            "footer",
            "Drawn by lightning-rlhf ",
            versions()["lightning-rlhf"],
            ". Reward is in the reward's own unit, KL and log-probabilities are in nats, lengths in tokens.",
        ),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{name}: run report"),
        element("style", STYLE),
    )
    return "<!DOCTYPE html>\n" + page_text(element("html", head, body, lang="en")) + "\n"


def moment(time: datetime) -> str:
    """A time for people: to the minute, with its zone."""
    return f"{time:%Y-%m-%d %H:%M} {time:%Z}".strip()


def overview(runs: Sequence[Run]) -> Element:
    """A table of all runs, each a link to its section."""
    head = element(
        "tr", *(element("th", word) for word in ("run", "algorithm", "steps", "seconds", "what it came to"))
    )
    rows = [
        element(
            "tr",
            element("td", element("a", run.name or run.path.name, href=f"#run-{place}")),
            element("td", run.algorithm or "unknown"),
            element("td", last_step(run) or "", class_="number"),
            element("td", "" if run.seconds is None else f"{run.seconds:.0f} s", class_="number"),
            element(
                "td", "; ".join(f"{title} {value} {unit}" for title, value, unit, _ in headlines(run)[:3])
            ),
        )
        for place, run in enumerate(runs)
    ]
    return element(
        "section",
        element("h2", f"{len(runs)} runs"),
        element(
            "div",
            element("table", element("thead", head), element("tbody", rows)),
            class_="scroll",
            tabindex="0",
        ),
    )


def run_section(run: Run, place: int, folder: str) -> Element:
    """Everything about one run; what it did not leave is said at the end."""
    columns = sample_columns(run)
    present = {
        "goodhart": run.goodhart is not None,
        "hacking": bool(run.hacking),
        "samples": bool(columns),
        "curves": bool(run.curves),
        "configuration": run.configuration is not None,
        "date": run.began is not None,
        "seconds": run.seconds is not None,
        "versions": bool(run.versions),
    }
    absent = [words for key, words in ABSENT.items() if not present[key]]
    if run.algorithm == "labelling":
        absent = []
    return element(
        "section",
        element("h2", f"{run.name or folder}: {run.algorithm}" if run.algorithm else run.name or folder),
        what_ran(run),
        cards(run),
        _part("Over-optimisation", goodhart_section(run.goodhart) if run.goodhart else []),
        _part("Detectors of reward hacking", detectors_section(run.hacking) if run.hacking else []),
        _part("Samples side by side", samples_section(columns) if columns else []),
        _part("Curves", curves_section(run.curves, run.algorithm)),
        _part("Configuration and versions", configuration(run)),
        _part(
            "Could not be read",
            [element("ul", *(element("li", p) for p in run.problems), class_="absent")]
            if run.problems
            else [],
        ),
        _part(
            "Not in this run",
            [element("ul", *(element("li", _coded(words)) for words in absent), class_="absent")]
            if absent
            else [],
        ),
        class_="run",
        id=f"run-{place}",
    )


def _part(title: str, content: Sequence[Element]) -> list[Element]:
    return [element("h3", title), *content] if content else []


def _coded(words: str) -> list[str | Element]:
    """Words with what is between backquotes as code."""
    return [element("code", part) if i % 2 else part for i, part in enumerate(words.split("`"))]


def what_ran(run: Run) -> Element:
    """Algorithm, dates, duration and steps."""
    facts = {
        "algorithm": run.algorithm or "unknown",
        "began": moment(run.began) if run.began else "not recorded",
        "last written": moment(run.ended) if run.ended else "not known",
        "training took": duration(run),
        "steps": last_step(run) or "none logged",
    }
    if run.ranked is not None:
        facts = {"ranked": f"{run.ranked} rows", "last written": facts["last written"]}
    pairs = [(element("dt", name), element("dd", value)) for name, value in facts.items()]
    return element("dl", *pairs, class_="facts")


def duration(run: Run) -> str:
    """How long training took, or what is known of it."""
    if run.seconds is not None:
        return f"{timedelta(seconds=round(run.seconds))} h:min:s, by Lightning's Timer"
    if run.began and run.ended:
        between = timedelta(seconds=round((run.ended - run.began).total_seconds()))
        return f"about {between} h:min:s, from its beginning to its last file"
    return "not known"


def last_step(run: Run) -> str | None:
    """How far it came: optimizer steps by its checkpoint or its monitors, else what was logged."""
    watched = [one["step"] for one in (*run.evaluations, *run.hacking)]
    known = max([*watched, run.steps or 0])
    if known:
        return f"{known} optimizer steps"
    logged = [
        curve.steps[-1]
        for name, curve in run.curves.items()
        if not name.startswith(("goodhart/", "hacking/"))
    ]
    return f"{max(logged) + 1} {step_unit('', run.algorithm)}" if logged else None


def headlines(run: Run) -> list[tuple[str, str, str, str]]:
    """Title, last value, unit, and where it came from, of what says most of a run."""
    found = []
    for name in HEADLINES:
        several = [
            (stage, run.curves[f"{stage}/{name}"])
            for stage in ("train", "val")
            if f"{stage}/{name}" in run.curves
        ]
        several = [(stage, curve) for stage, curve in several if last_finite(curve) is not None]
        if several:
            words = meaning(name)
            stage, curve = several[0]
            title = words.title if stage == "train" else f"{words.title}, validation"
            beside = [f"validation {compact(last_finite(c))}" for s, c in several[1:] if s == "val"]
            found.append((title, compact(last_finite(curve)), words.unit, "; ".join([_from(curve), *beside])))
    if run.goodhart is not None:
        gold, errors = run.goodhart["curve"]["gold"], run.goodhart["curve"]["gold_error"]
        alarms = run.goodhart["alarms"]
        half = f" ± {1.96 * errors[-1]:.2f}" if errors[-1] is not None else ""
        found.append(
            (
                "Gold at the end",
                signed(gold[-1]) + half,
                "SDs of the start",
                f"best {signed(max(gold))}, 95% interval",
            )
        )
        found.append(
            (
                "Alarm",
                f"step {alarms[0]}" if alarms else "none",
                "",
                "gold fell while the proxy rose" if alarms else f"in {len(gold)} evaluations",
            )
        )
    return found


def _from(curve: Curve) -> str:
    first = last_finite(Curve(curve.steps[::-1], curve.values[::-1]))
    return f"from {compact(first)}"


def compact(value: float | None) -> str:
    """Three or four digits.

    Example:
        >>> compact(0.012345), compact(-12.345), compact(123456.0)
        ('0.0123', '−12.3', '123,456')
    """
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def cards(run: Run) -> Element | None:
    """The headline numbers."""
    found = [
        element(
            "div",
            element("dt", title),
            element("dd", element("span", value, " ", element("small", unit), class_="value")),
            element("dd", note, class_="hint"),
            class_="card alarmed" if title == "Alarm" and value != "none" else "card",
        )
        for title, value, unit, note in headlines(run)
    ]
    return element("dl", found, class_="cards") if found else None


def configuration(run: Run) -> list[Element]:
    """The configuration, closed until asked for, and the versions."""
    parts = []
    if run.configuration is not None:
        name, text = run.configuration
        parts.append(element("details", element("summary", f"Configuration ({name})"), element("pre", text)))
    if run.versions:
        listed = ", ".join(f"{name} {number}" for name, number in run.versions.items())
        parts.append(
            element("p", f"Trained with {re.sub(' ', chr(0xA0), listed).replace(',' + chr(0xA0), ', ')}.")
        )
    return parts
