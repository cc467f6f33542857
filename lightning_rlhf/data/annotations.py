"""What was said of completions: margins, ranks and labels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.data.prompts import Text
from lightning_rlhf.data.report import BadRow


def read_margin(row: Mapping[str, Any]) -> dict[str, float]:
    """By how much a pair's chosen completion is better, where the data says so.

    Args:
        row: Its values by column.

    Returns:
        ``{"margin": …}``, or nothing without such a column.

    Raises:
        BadRow: If it is no finite number.

    Example:
        >>> read_margin({"margin": 2}), read_margin({})
        ({'margin': 2.0}, {})
    """
    return {"margin": _number(row["margin"], "margin")} if "margin" in row else {}


def read_ranks(row: Mapping[str, Any], completions: Sequence[Text]) -> tuple[float, ...]:
    """The ranks of a prompt's completions, lower being better.

    Args:
        row: Its values by column; without ``ranks`` the first completion is the best.
        completions: Texts or messages, in the row's order.

    Returns:
        One rank a completion, in the row's order; equal ones are ties.

    Raises:
        BadRow: If there are fewer than two completions, another number of ranks, one that is no finite number, no
            two that differ, or different ones for the same completion.

    Example:
        >>> read_ranks({}, ["a", "b", "c"])
        (0.0, 1.0, 2.0)
        >>> read_ranks({"ranks": [2, 1, 2]}, ["a", "b", "c"])
        (2.0, 1.0, 2.0)
    """
    if len(completions) < 2:
        raise BadRow(
            "too few completions", f"column 'completions' has {len(completions)}; a ranking needs two or more"
        )
    given = row.get("ranks", range(len(completions)))
    if given is None:
        raise BadRow(
            "missing value",
            "column 'ranks' has no value (null); give every row ranks, or no row where completions are best first",
        )
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise BadRow(
            "wrong type",
            f"column 'ranks' is of type {type(given).__name__}; it must be a list of numbers, 1 for the best",
        )
    if len(given) != len(completions):
        raise BadRow(
            "contradictory ranks",
            f"column 'ranks' has {len(given)} values for {len(completions)} completions; give each one its rank",
        )
    ranks = tuple(_number(rank, "ranks") for rank in given)
    if len(set(ranks)) == 1:
        raise BadRow("equal ranks", f"all ranks are {ranks[0]:g}; there is nothing to learn from ties alone")
    _check_duplicates(completions, ranks)
    return ranks


def read_label(row: Mapping[str, Any]) -> dict[str, float]:
    """Whether a completion is desirable.

    Args:
        row: Its values by column.

    Returns:
        ``{"label": 1.0}`` or ``{"label": 0.0}``.

    Raises:
        BadRow: If it is neither a truth value nor 0 or 1.

    Example:
        >>> read_label({"label": True}), read_label({"label": 0})
        ({'label': 1.0}, {'label': 0.0})
    """
    label = row.get("label")
    if label is None:
        raise BadRow("missing value", "column 'label' has no value (null); every row needs one")
    if not isinstance(label, int | float):
        raise BadRow(
            "wrong type",
            f"column 'label' is {label!r:.40}, of type {type(label).__name__}; it must be true or false, or 1 or 0: "
            "convert it before, for example by rows.map(lambda row: {'label': row['label'] == 'true'})",
        )
    if label not in (0, 1):
        raise BadRow("wrong label", f"column 'label' is {label}; it must be true or false, or 1 or 0")
    return {"label": float(label)}


def _check_duplicates(completions: Sequence[Text], ranks: Sequence[float]) -> None:
    for second in range(len(completions)):
        first = completions.index(completions[second])
        if ranks[first] != ranks[second]:
            raise BadRow(
                "contradictory ranks",
                f"completions {first + 1} and {second + 1} are identical, but their ranks are {ranks[first]:g} and "
                f"{ranks[second]:g}; a completion has one rank",
            )


def _number(value: Any, column: str) -> float:  # noqa: ANN401 - whatever the data has
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = type(value).__name__
        raise BadRow(
            "wrong type",
            f"column {column!r} is of type {kind}; it must be a number"
            if column == "margin"
            else f"column {column!r} holds a value of type {kind}; ranks are numbers, 1 for the best",
        )
    if not math.isfinite(value):
        raise BadRow("not finite", f"column {column!r} is {value}; it must be finite")
    return float(value)
