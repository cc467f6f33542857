"""A configuration parser whose errors begin with the key that is wrong."""

import re
import sys
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_rlhf.algorithms.estimators import Estimator
from lightning_rlhf.objectives import Objective

# Dataclasses are otherwise taken as they are annotated: `objective` could name no subclass.
set_parsing_settings(subclasses_enabled=[Objective, Estimator])

USAGE = 2
_WRONG_KEY = re.compile(r"Option '([^']+)' is not accepted|Key '([^']+)' is not expected")
_PARENT = re.compile(r"Parser key \"([^\"]+)\"")


class ConfigParser(LightningArgumentParser):
    """LightningCLI's parser with a summary in front of jsonargparse's report."""

    def add_class_arguments(self, theclass: type, *arguments: Any, **settings: Any) -> list[str]:  # noqa: ANN401
        """Leave the files that a datamodule is given alone: they hold rows.

        jsonargparse would read ``train: rows.json`` as a configuration: slow where it is long, and None where it is
        empty.
        """
        if isinstance(theclass, type) and issubclass(theclass, LightningDataModule):
            settings["sub_configs"] = False
        return super().add_class_arguments(theclass, *arguments, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with code 2."""
        if not self.exit_on_error:  # a parser of a nested class: the outermost one speaks
            super().error(message, ex)
        summary = unknown_key(message, _option_names(self))
        print(f"lightning-rlhf: error: {summary or message}", file=sys.stderr)
        if summary:
            print(f"\nIn full:\n{message}", file=sys.stderr)
        raise SystemExit(USAGE)


def unknown_key(report: str, names: list[str]) -> str | None:
    r"""The key that no class accepts, from jsonargparse's nested report.

    Args:
        report: The report.
        names: Keys that exist, to suggest one from.

    Returns:
        One line, or None where the report is about something else.

    Example:
        >>> unknown_key('Parser key "model":\n  Parser key "optimization":\n    Option \'lrr\' is not accepted', ["lr"])
        "unknown key 'lrr' in model.optimization (did you mean 'lr'?)"
    """
    found = _WRONG_KEY.search(report)
    if found is None:
        return None
    key = next(group for group in found.groups() if group)
    parents = ".".join(_PARENT.findall(report[: found.start()]))
    close = get_close_matches(key, names, n=1)
    where = f" in {parents}" if parents else ""
    return f"unknown key {key!r}{where}" + (f" (did you mean {close[0]!r}?)" if close else "")


def _option_names(parser: LightningArgumentParser) -> list[str]:
    """Keys of the parser itself, and of the package's settings, which it knows only once a class is chosen."""
    from dataclasses import fields

    from lightning_rlhf import objectives
    from lightning_rlhf.algorithms import GAE, GRPO, KLControl, Optimization, Reinforce, Update
    from lightning_rlhf.generation import Sampling
    from lightning_rlhf.models import LoRA, Policy, Quantization

    losses = [
        thing for name in objectives.__all__ if issubclass(thing := getattr(objectives, name), Objective)
    ]
    online = (Sampling, KLControl, Update, GAE, GRPO, Reinforce)
    settings = (Policy, LoRA, Quantization, Optimization, *online, *losses)
    names = [field.name for cls in settings for field in fields(cls)]
    return names + [action.dest.rsplit(".", 1)[-1] for action in parser._actions]
