"""Samples of a policy side by side: at the start, where gold was best, and at the end."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from lightning_rlhf.cli.markup import element
from lightning_rlhf.cli.run_report import Run

MAX_PROMPTS = 4
NAMES = {"kl": "KL {:.2f} nats", "proxy": "proxy {:.2f}", "gold": "gold {:.2f}", "score": "reward {:.2f}"}


class Column(NamedTuple):
    """Samples of one moment.

    Attributes:
        title: Which.
        texts: By prompt.
        numbers: By prompt, as words.
    """

    title: str
    texts: Mapping[str, str]
    numbers: Mapping[str, str]


def sample_columns(run: Run) -> list[Column]:
    """The moments that a run left samples of: the monitor's, else the validations'; none where it left none."""
    if run.evaluations and run.evaluations[0].get("prompts"):
        return _of_monitor(run)
    return _of_validations(run)


def moments(steps: Sequence[int], best: int | None) -> list[tuple[int, str]]:
    """Which steps are shown, and what each is.

    Example:
        >>> moments([0, 8, 16, 24], 8)
        [(0, 'Start (step 0)'), (8, 'Best gold (step 8)'), (24, 'End (step 24)')]
        >>> moments([0, 8], 0), moments([5], None)
        ([(0, 'Start, best gold (step 0)'), (8, 'End (step 8)')], [(5, 'End (step 5)')])
    """
    titles: dict[int, list[str]] = {}
    for step, title in ((steps[0], "Start"), (best, "best gold"), (steps[-1], "end")):
        if step is not None:
            titles.setdefault(step, []).append(title)
    if len(steps) == 1:
        titles = {steps[0]: ["end"]}
    return [
        (step, f"{', '.join(words)[0].upper()}{', '.join(words)[1:]} (step {step})")
        for step, words in sorted(titles.items())
    ]


def _of_monitor(run: Run) -> list[Column]:
    by_step = {one["step"]: one for one in run.evaluations if one.get("completions")}
    prompts = [as_text(prompt) for prompt in run.evaluations[0]["prompts"]]
    best = (run.goodhart or {}).get("best", {}).get("step")
    found = []
    for step, title in moments(sorted(by_step), best if best in by_step else None):
        one = by_step[step]
        numbers = [
            _numbers({name: one[name][i] for name in ("kl", "proxy", "gold")}) for i in range(len(prompts))
        ]
        found.append(
            Column(
                title,
                dict(zip(prompts, one["completions"], strict=True)),
                dict(zip(prompts, numbers, strict=True)),
            )
        )
    return found


def _of_validations(run: Run) -> list[Column]:
    if not run.samples:
        return []
    steps = list(run.samples)
    best = (run.goodhart or {}).get("best", {}).get("step")
    nearest = None if best is None else min(steps, key=lambda step: abs(step - best))
    found = []
    for step, title in moments(steps, nearest):
        rows = {as_text(row["prompt"]): row for row in run.samples[step]}
        texts = {prompt: row["completion"] for prompt, row in rows.items()}
        found.append(Column(title, texts, {prompt: _numbers(row) for prompt, row in rows.items()}))
    return found


def _numbers(row: Mapping[str, Any]) -> str:
    words = [form.format(row[name]) for name, form in NAMES.items() if row.get(name) is not None]
    return ", ".join(words).replace("-", "−")


def as_text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt as text; of messages, each with its role.

    Example:
        >>> as_text([{"role": "user", "content": "Hi"}])
        'user: Hi'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def samples_section(columns: Sequence[Column], count: int = MAX_PROMPTS) -> list[Element]:
    """The first prompts that all columns have, each with its samples side by side."""
    shared = [prompt for prompt in columns[0].texts if all(prompt in column.texts for column in columns)]
    parts = []
    for prompt in shared[:count]:
        parts.append(element("div", element("pre", prompt, dir="auto"), class_="prompt"))
        cells = [
            element(
                "div",
                element("h5", column.title),
                element("pre", column.texts[prompt] or "(nothing)", dir="auto"),
                element("p", column.numbers[prompt], class_="hint"),
                class_="sample",
            )
            for column in columns
        ]
        parts.append(element("div", cells, class_="columns"))
    if not shared:
        parts.append(
            element("p", "The moments share no prompt, so that nothing can be compared.", class_="soft")
        )
    return parts
