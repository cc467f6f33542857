"""Plain typed functions as commands."""

from collections.abc import Callable
from inspect import getdoc, signature
from typing import Any, get_type_hints

from docstring_parser import parse
from jsonargparse import ArgumentParser


def run_function(function: Callable[..., Any], arguments: list[str], *, positional: str | None = None) -> Any:  # noqa: ANN401 - whatever the function returns
    """Parse arguments by a function's signature and docstring, and call it.

    Args:
        function: Annotated, with a Google docstring.
        arguments: What follows the command's name.
        positional: A parameter that is given without its name.

    Returns:
        What the function returns.

    Example:
        >>> def double(number: int, times: int = 2) -> int:
        ...     '''Multiply.'''
        ...     return number * times
        >>> run_function(double, ["21", "--times", "3"], positional="number")
        63
    """
    documentation = parse(getdoc(function) or "")
    parser = ArgumentParser(
        prog=f"lightning-rlhf {function.__name__.replace('_', '-')}",
        description=documentation.short_description,
    )
    parser.add_argument("-c", "--config", action="config", help="A YAML file with arguments.")
    texts = {parameter.arg_name: parameter.description for parameter in documentation.params}
    types = get_type_hints(function)
    # jsonargparse would ask for a value: `--overwrite true`.
    flags = {name for name, parameter in signature(function).parameters.items() if parameter.default is False}
    if positional is not None:
        parser.add_argument(positional, type=types[positional], help=texts.get(positional))
    parser.add_function_arguments(function, as_group=False, skip={*flags, positional or ""})
    for name in sorted(flags):
        parser.add_argument(f"--{name}", action="store_true", help=texts.get(name))
    # Renamed in jsonargparse 4.49; the old name warns.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    values = instantiate(parser.parse_args(arguments))
    return function(**{name: value for name, value in vars(values).items() if name != "config"})
