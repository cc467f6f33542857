"""Plain typed functions as commands."""

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser


def run_function(function: Callable[..., Any], arguments: list[str], *, positional: bool = False) -> Any:  # noqa: ANN401
    """Parse arguments by a function's signature and docstring, and call it.

    Args:
        function: Annotated, with a Google docstring.
        arguments: What follows the command's name.
        positional: Parameters without a default may be given without their name: the first one only.

    Returns:
        What the function returns.
    """
    parser = ArgumentParser(prog=f"lightning-rlhf {function.__name__}", description=(function.__doc__ or "").split("\n")[0])
    names = [word for word in arguments]
    if positional and names and not names[0].startswith("-"):
        names[0] = f"--{next(iter(function.__annotations__))}={names[0]}"
    parser.add_argument("-c", "--config", action="config", help="A YAML file with arguments.")
    parser.add_function_arguments(function, as_group=False)
    values = parser.instantiate_classes(parser.parse_args(names))
    values.pop("config", None)
    return function(**values)
