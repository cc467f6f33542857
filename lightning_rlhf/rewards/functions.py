"""Plain Python functions as rewards, by name or object, also coroutines."""

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.rewards.base import Reward
from lightning_rlhf.rewards.samples import Samples, shown


class FunctionReward(Reward):
    """A function that is called as TRL calls its reward functions, and returns a list of numbers.

    ``function(prompts=…, completions=…, completion_ids=…, **columns)``, with ``prompt_ids`` and ``truncated`` beside
    them, and each column of the data as a list. A function without ``**kwargs`` is given what it names. Where prompts
    are conversations, each completion is ``[{"role": "assistant", "content": …}]``, else it is text. A coroutine runs
    in an event loop of its own, together with the coroutines of other rewards of a sum, whether or not the caller has
    a loop.

    Args:
        function: ``package.module:function``, ``path/to/file.py:function``, or the function itself.
        name: What its values are logged under; by default the function's name.
        none_value: What stands for a None, by which a TRL function says "not applicable". Without it a None is an
            error: TRL leaves it out of the sum, as 0.0 does here.

    Raises:
        ValueError: If there is no such function.

    Example:
        >>> from lightning_rlhf.rewards import score
        >>> def has_answer(completions, answer):
        ...     return [float(a in c) for c, a in zip(completions, answer)]
        >>> samples = Samples(["6 × 7"], ["It is 42."], [[5]], [[6]], [False], {"answer": ["42"], "id": [1]})
        >>> score(FunctionReward(has_answer), samples).parts
        {'has_answer': tensor([1.])}
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        name: str | None = None,
        none_value: float | None = None,
    ) -> None:
        found = load_function(function) if isinstance(function, str) else function
        super().__init__(name or name_of(found))
        self.function = found
        self.none_value = none_value

    def start(self, samples: Samples) -> Callable[[], Tensor]:
        """Begin, if it is a coroutine; a plain function is called when its result is waited for."""
        if not is_coroutine_function(self.function):
            return partial(self, samples)
        running = asyncio.run_coroutine_threadsafe(self._call(samples), event_loop(os.getpid()))
        return lambda: self._numbers(running.result(), samples)

    def forward(self, samples: Samples) -> Tensor:
        """What the function returns, ``(N,)``."""
        if is_coroutine_function(self.function):
            return self.start(samples)()
        return self._numbers(self._call(samples), samples)

    def _call(self, samples: Samples) -> Any:  # noqa: ANN401 - a list, or a coroutine
        return self.function(**arguments(self.function, samples))

    def _numbers(self, values: Any, samples: Samples) -> Tensor:  # noqa: ANN401 - whatever it returned
        if isinstance(values, Tensor):
            return values
        if not isinstance(values, Iterable) or isinstance(values, str | Mapping):
            raise TypeError(f"it returned a {type(values).__name__}, and must return a list of numbers")
        values = list(values)
        missing = [i for i, value in enumerate(values) if value is None]
        if missing and self.none_value is None:
            raise ValueError(
                f"it returned None for {len(missing)} of {len(values)} samples, first for the one with the prompt "
                f"{shown(samples.prompts[missing[0]])}: return a number, or say by none_value which number stands "
                "for 'not applicable' (0.0 adds nothing to a sum)"
            )
        return torch.tensor([self.none_value if value is None else float(value) for value in values])


def arguments(function: Callable[..., Any], samples: Samples) -> dict[str, Any]:
    """What a function is called with: all there is, or what it names.

    Args:
        function: With ``**kwargs`` or without.
        samples: Where the values come from.

    Returns:
        Keyword arguments.

    Raises:
        ValueError: If it needs what is not there, or a column has the name of another argument.

    Example:
        >>> samples = Samples(["Hi"], ["Yo"], [[5]], [[6]], [False], {"answer": ["42"]})
        >>> arguments(lambda completions, answer: [], samples)
        {'completions': ['Yo'], 'answer': ['42']}
    """
    given: dict[str, Any] = {
        "prompts": list(samples.prompts),
        "completions": [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(samples.prompts, samples.completions, strict=True)
        ],
        "completion_ids": list(samples.completion_ids),
        "prompt_ids": list(samples.prompt_ids),
        "truncated": list(samples.truncated),
    }
    clash = sorted(set(given) & set(samples.columns))
    if clash:
        raise ValueError(
            f"the data has a column {clash[0]!r}, which is an argument of every function: rename it"
        )
    given |= {name: list(values) for name, values in samples.columns.items()}
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        wanted = given
    else:
        wanted = {name: value for name, value in given.items() if name in {p.name for p in parameters}}
    optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(
            f"it needs {missing[0]!r}, which is not among what it can be given: {', '.join(given)}"
        )
    return wanted


def load_function(where: str) -> Callable[..., Any]:
    """Import a function by name.

    Args:
        where: ``package.module:function``, or ``path/to/file.py:function``.

    Returns:
        The function.

    Raises:
        ValueError: If the text has another form, or there is no such module, file or function.

    Example:
        >>> load_function("math:sqrt")(9.0)
        3.0
    """
    place, colon, name = where.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(
            f"{where!r} names no function: write package.module:function or path/to/file.py:function"
        )
    module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(f"{place} has no function {name!r}; it has {', '.join(own) or 'none'}")
    return function


def _from_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there, something that it needs is not
        raise ValueError(f"no module {name!r} to import: is its folder on the Python path?") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r} (from {Path.cwd()})")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"reward_{path.stem}_{digest}"  # two files of one name are two modules
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{str(path)!r} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look it up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, or of the class of an object that is called.

    Example:
        >>> name_of(name_of), name_of(partial(name_of))
        ('name_of', 'name_of')
    """
    if isinstance(function, partial):
        return name_of(function.func)
    return str(getattr(function, "__name__", type(function).__name__))


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Whether calling it, a function or an object, gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - of its class, which may be a coroutine
    )


@lru_cache(maxsize=1)
def event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop in a thread of its own that all coroutines of a process run in.

    It stays for the life of the process: what a function opened in it, such as a client with its connections, would
    not work in another one.

    Args:
        process: The id of this process: a fork has no thread, and so needs a loop of its own.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"rewards-{process}", daemon=True).start()
    return loop
