"""What a training writes down of itself beside its configuration: when it began, and with which versions."""

import json
import platform
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

RUN_FILE = "run.json"
PACKAGES = ("lightning-rlhf", "torch", "lightning", "transformers", "peft")


def write_facts(folder: Path) -> None:
    """Write ``run.json``: the time, and the versions."""
    began = datetime.now().astimezone().isoformat(timespec="seconds")
    (folder / RUN_FILE).write_text(json.dumps({"began": began, "versions": versions()}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Python's and the packages' versions.

    Example:
        >>> list(versions())
        ['python', 'lightning-rlhf', 'torch', 'lightning', 'transformers', 'peft']
    """
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
