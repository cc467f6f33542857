"""lightning-rlhf memory: predict, before anything is loaded, what a training takes, and what would make it fit."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO

import torch
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lightning_rlhf.algorithms.footprint import Forecast, Training, forecast
from lightning_rlhf.cli.memory_config import Config, Sizes, training_of
from lightning_rlhf.cli.memory_switches import Suggestion, suggestions
from lightning_rlhf.cli.training import RLHFCLI
from lightning_rlhf.models.memory import ACTIVATIONS, HOST, LOGITS

GIB = 2**30
RESERVE = GIB
"""Assumed, not measured: a CUDA context with its libraries and what the allocator keeps besides; on a CPU, Python."""
LESS = 0.9
"""Of what a training was predicted to take, where it ran out of memory all the same."""
GPUS: Mapping[str, int] = {
    **{"RTX 3060": 12, "RTX 3080": 10, "RTX 3090": 24, "RTX 4060 Ti": 16, "RTX 4070": 12, "RTX 4080": 16},
    **{
        "RTX 4090": 24,
        "RTX 5080": 16,
        "RTX 5090": 32,
        "RTX 6000 Ada": 48,
        "RTX A6000": 48,
        "RTX PRO 6000": 96,
    },
    **{"T4": 16, "V100": 32, "A10": 24, "L4": 24, "L40S": 48, "A100 40GB": 40, "A100 80GB": 80, "H100": 80},
    **{"H200": 139, "B200": 178},
}
"""Memory in GiB, by data sheet; a little less is free."""


class DoesNotFitError(RuntimeError):
    """A training ran out of memory; the message says what it takes, and what would help."""


class MemoryCLI(RLHFCLI):
    """The configuration of a training, parsed and not built."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(arguments, run=False, command="memory")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a prediction has to know besides."""
        super().add_arguments_to_parser(parser)
        texts = {
            "gpu": (str, "A GPU by name, such as 'RTX 4090', instead of the one that is here."),
            "gib": (float, "Memory in GiB, instead of a GPU's."),
            "prompt_tokens": (int, "Tokens of every prompt; by default as many as the data's limits allow."),
            "completion_tokens": (int, "Tokens of every completion; by default what max_length leaves."),
            "completions": (int, "Completions of a prompt, of rankings for a reward model; by default 2."),
        }
        for name, (kind, text) in texts.items():
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=text)

    def instantiate_classes(self) -> None:
        """Build nothing."""

    @property
    def plain(self) -> Config:
        """The configuration as plain values."""
        sections = {name: self.config[name] for name in ("model", "data", "trainer")}
        return {name: section.as_dict() for name, section in sections.items()}

    @property
    def sizes(self) -> Sizes:
        """What was said of the rows."""
        config = self.config
        return Sizes(config.prompt_tokens, config.completion_tokens, config.completions)


@dataclass(frozen=True)
class Device:
    """Where a training is to run, and its memory in bytes."""

    name: str
    memory: int


def device_of(gpu: str | None, gib: float | None, accelerator: str) -> Device:
    """The device that is named, or the one that is here.

    Raises:
        ValueError: If no GPU of that name is known.

    Example:
        >>> device_of("rtx 4090", None, "auto")
        Device(name='RTX 4090', memory=25769803776)
    """
    if gib is not None:
        return Device(gpu or f"{gib:g} GiB", int(gib * GIB))
    if gpu is not None:
        known = {name.lower(): name for name in GPUS}
        if gpu.lower() not in known:
            close = [known[name] for name in get_close_matches(gpu.lower(), known, n=3)] or list(GPUS)
            raise ValueError(
                f"no GPU {gpu!r} is known (near it: {', '.join(close)}): give its memory by --gib"
            )
        name = known[gpu.lower()]
        return Device(name, GPUS[name] * GIB)
    if torch.cuda.is_available() and accelerator not in ("cpu", "mps"):
        return Device(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)
    return Device("this machine's CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def table_of(found: Forecast) -> Table:
    """A row a part: the most it takes, and what it takes when a phase takes the most."""
    unit, name = (GIB, "GiB") if found.total > GIB else (GIB // 1024, "MiB")
    table = Table()
    table.add_column(name)
    table.add_column("at most", justify="right")
    for phase in found.phases:
        worst = len(found.phases) > 1 and phase is found.worst
        table.add_column(phase.name, justify="right", style="bold" if worst else "")
    names = dict.fromkeys(name for phase in found.phases for name in phase.peak.most)
    for name in sorted(names, key=lambda name: name in (ACTIVATIONS, LOGITS)):
        if name == HOST:
            continue
        most = max(phase.peak.most.get(name, 0) for phase in found.phases)
        if most >= unit / 200:
            cells = [phase.peak.parts.get(name, 0) for phase in found.phases]
            table.add_row(name, *(f"{size / unit:,.2f}" for size in (most, *cells)))
    table.add_section()
    table.add_row("all at a time", "", *(f"{phase.peak.total / unit:,.2f}" for phase in found.phases))
    return table


def headline(training: Training, found: Forecast) -> str:
    """What is trained, and on what."""
    policy = training.policy
    kinds = [f"{policy.quantization.bits}-bit" if policy.quantization else "", "LoRA" if policy.lora else ""]
    batch = f"{training.groups} prompts"
    each = training.sampling.num_samples if training.samples else training.completions
    sizes = f"{batch} × {each} completions, {training.prompt} + {training.completion} tokens"
    what = " ".join(word for word in kinds if word)
    return (
        f"{training.algorithm} of {policy.path}{f' ({what})' if what else ''}, {training.precision}, "
        f"{training.optimizer}, {found.trainable / 1e6:,.1f}M trained parameters\n{sizes}"
    )


def verdict(found: Forecast, device: Device) -> str:
    """Whether it fits."""
    needed = found.total + RESERVE
    how = "fits into" if needed <= device.memory else "does not fit into"
    paged = (
        f"; {found.paged / GIB:,.2f} GiB of the optimizer are paged, in host memory" if found.paged else ""
    )
    if found.offloaded:
        paged += f"; {found.offloaded / GIB:,.2f} GiB of activations are held there"
    return (
        f"{needed / GIB:,.1f} GiB, {RESERVE / GIB:,.1f} of them assumed for context and libraries: {how} the "
        f"{device.memory / GIB:,.1f} GiB of {device.name}{paged}"
    )


def help_table(found: list[Suggestion], limit: int) -> Table | Text:
    """A row a switch, each on top of those above it."""
    if not found:
        return Text("No switch of this command makes it smaller.")
    fits = found[-1].found.total <= limit
    title = "what makes it fit, cheapest first" if fits else "what helps, cheapest first; it is not enough"
    table = Table(title=f"{title} (each on top of those above)", title_justify="left", title_style="")
    table.add_column("switch", overflow="fold")
    table.add_column("GiB then", justify="right")
    table.add_column("costs")
    for one in found:
        table.add_row(str(one.switch), f"{(one.found.total + RESERVE) / GIB:,.1f}", one.switch.costs)
    return table


def report(cli: MemoryCLI, console: Console, *, ran_out: bool = False) -> None:
    """Predict and print.

    Args:
        cli: The configuration.
        console: Where to.
        ran_out: Whether the memory that there is was not enough: something smaller is looked for in any case.
    """
    config, sizes = cli.plain, cli.sizes
    device = device_of(cli.config.gpu, cli.config.gib, str(config["trainer"].get("accelerator")))
    training = training_of(config, sizes)
    found = forecast(training)
    console.print(Group(headline(training, found), table_of(found), verdict(found, device)))
    limit = device.memory - RESERVE
    if ran_out and found.total <= limit:
        console.print("By this it should fit: look for other processes on the device, or for longer rows.")
        limit = int(LESS * found.total)
    if found.total > limit:
        console.print(help_table(list(suggestions(config, sizes, limit, found)), limit))


def does_not_fit(error: torch.OutOfMemoryError, arguments: list[str]) -> Exception:
    """What to raise instead of a bare error: the table, and the switches that would help.

    Args:
        error: As PyTorch raised it.
        arguments: Of ``fit``.

    Returns:
        The error to raise from it; the same one on all ranks but the first of a machine, which says it for all.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return error
    print("out of memory; predicting what would fit …", file=sys.stderr)
    text = StringIO()
    try:
        report(MemoryCLI(arguments), Console(file=text, width=120), ran_out=True)
    except (ValueError, OSError, RuntimeError) as problem:
        text.write(f"what it takes could not be predicted: {problem}")
    return DoesNotFitError(f"{error}\n\nPredicted:\n{text.getvalue()}")


def main(arguments: list[str]) -> None:
    """Predict what ``fit`` with the same arguments would take; nothing is loaded."""
    report(MemoryCLI(arguments), Console())
