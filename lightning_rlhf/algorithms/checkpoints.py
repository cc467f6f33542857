"""What a checkpoint holds so that it fits any strategy and number of ranks, and whether it fits a module."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

Shapes = dict[str, list[int] | None]


def shapes(state: Mapping[str, Any]) -> Shapes:
    """The names in a module's state, with the shapes of tensors.

    Example:
        >>> shapes(nn.Linear(3, 2).state_dict())
        {'weight': [2, 3], 'bias': [2]}
    """
    # What modules keep as extra state is no tensor.
    return {name: list(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}


def require_fit(expected: Shapes, found: Shapes, name: str) -> None:
    """Refuse a state of other names or shapes than a module's.

    Args:
        expected: Of the module.
        found: In the checkpoint.
        name: Of the module's class.

    Raises:
        RuntimeError: If an adapter, head or trained weight is missing, unknown or of another shape.

    Example:
        >>> require_fit({"a": [2]}, {"b": [2]}, "DPO")
        Traceback (most recent call last):
        RuntimeError: the checkpoint does not fit this DPO: missing ['a'], unknown ['b'] (first five each). ...
    """
    missing, unknown = sorted(set(expected) - set(found))[:5], sorted(set(found) - set(expected))[:5]
    if missing or unknown:
        raise RuntimeError(
            f"the checkpoint does not fit this {name}: missing {missing}, unknown {unknown} (first five each). Was it "
            "trained with another policy, or with other LoRA settings?"
        )
    require_shapes(expected, found, name)


def require_shapes(expected: Shapes, found: Shapes, name: str) -> None:
    """Refuse a state in which a tensor of the module's has another shape; see :func:`require_fit`.

    Raises:
        RuntimeError: If there is one.
    """
    for key in sorted(set(expected) & set(found)):
        if None not in (expected[key], found[key]) and expected[key] != found[key]:
            raise RuntimeError(
                f"the checkpoint does not fit this {name}: {key} has the shape {_shown(found[key])} in it, "
                f"{_shown(expected[key])} here. Was it trained with another policy, or with other LoRA settings?"
            )


def _shown(shape: list[int] | None) -> str:
    return str(tuple(shape or ()))


def beside_parameters(state: Mapping[str, Any], parameters: Iterable[str]) -> dict[str, Any]:
    """What a module's state holds besides parameters: counts, coefficients, scales."""
    weights = set(parameters)
    return {name: value for name, value in state.items() if name not in weights}


def by_parameter(
    optimizer_state: Mapping[str, Any],
    groups: Iterable[Mapping[str, Any]],
    parameters: Iterable[nn.Parameter],
) -> dict[str, Any]:
    """An optimizer's state with each parameter called by its place among all parameters of the module.

    An optimizer calls them by their place in its groups. It does not care, and loads either; FSDP2 reads the places
    among all parameters.

    Args:
        optimizer_state: Of an optimizer.
        groups: The optimizer's own.
        parameters: All of the module.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD([model.bias])
        >>> state = by_parameter(optimizer.state_dict(), optimizer.param_groups, model.parameters())
        >>> state["param_groups"][0]["params"]
        [1]
    """
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    own = [places[id(parameter)] for group in groups for parameter in group["params"]]
    given = [key for group in optimizer_state["param_groups"] for key in group["params"]]
    named = dict(zip(given, own, strict=True))
    return {
        **optimizer_state,
        "state": {named[key]: value for key, value in optimizer_state["state"].items()},
        "param_groups": [
            {**group, "params": [named[key] for key in group["params"]]}
            for group in optimizer_state["param_groups"]
        ],
    }
