"""A mismatched completion for every prompt: another row's, never its own."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

Indices = np.ndarray[Any, np.dtype[np.int64]]
VERSION = 1  # of what is written to the cache: raise it when the same settings give other partners
MANY = 1_000


def mismatch(prompts: Sequence[int], completions: Sequence[int], *, seed: int) -> Indices:
    """For every row another one with a different prompt and a different completion.

    Rows are laid out prompt by prompt in random order, and each takes the completion that lies as many rows further on
    as the largest prompt has rows: a permutation, so that the mismatched completions are the data's own. Where this
    meets an equal prompt or completion, two rows exchange their partners. Only where no exchange helps (one prompt or
    one completion makes up more than half of the rows) is a completion taken twice.

    Args:
        prompts: A number for each row, the same for equal prompts, ``(N,)``.
        completions: A number for each row, the same for equal completions, ``(N,)``.
        seed: Of the order.

    Returns:
        Row i's partner, ``(N,)``.

    Raises:
        ValueError: If a row has no partner: no other row differs in both.

    Example:
        >>> mismatch([0, 0, 1, 1], [0, 1, 2, 3], seed=0).tolist() in (
        ...     [2, 3, 0, 1],
        ...     [3, 2, 1, 0],
        ...     [2, 3, 1, 0],
        ...     [3, 2, 0, 1],
        ... )
        True
    """
    p, c = np.asarray(prompts, dtype=np.int64), np.asarray(completions, dtype=np.int64)
    draw = np.random.default_rng(seed)
    count = len(p)
    sizes = np.bincount(p)
    place = draw.permutation(len(sizes))[p]  # of each prompt in the random order
    order = np.lexsort((draw.random(count), place))
    partner = np.empty(count, dtype=np.int64)
    partner[order] = np.roll(order, -sizes.max())
    for row in np.flatnonzero((p == p[partner]) | (c == c[partner])).tolist():
        if p[row] != p[partner[row]] and c[row] != c[partner[row]]:
            continue  # an exchange for another row has mended it
        pool = _some(draw, count)
        mended = (p[row] != p[partner[pool]]) & (c[row] != c[partner[pool]])
        mended &= (p[pool] != p[partner[row]]) & (c[pool] != c[partner[row]])
        if mended.any():
            other = draw.choice(pool[mended])
            partner[[row, other]] = partner[[other, row]]
        else:
            partner[row] = draw.choice(_differing(p, c, row, pool))
    return partner


def _some(draw: np.random.Generator, count: int) -> Indices:
    """Rows to look for a partner in: all of them, or of many rows a random part."""
    return np.arange(count) if count <= MANY else draw.integers(count, size=MANY)


def _differing(p: Indices, c: Indices, row: int, pool: Indices) -> Indices:
    """Rows that differ from a row in both, from the pool or, where it has none, from all."""
    for among in (pool, np.arange(len(p))):
        found = among[(p[among] != p[row]) & (c[among] != c[row])]
        if len(found):
            return found
    if (p == p[row]).all():
        raise ValueError(
            f"all {len(p)} rows have the same prompt, so that no completion belongs to another; a reference point "
            "needs two prompts or more"
        )
    raise ValueError(
        f"the answer with row_id {row} has no partner: no row with another prompt has another completion; a "
        "reference point needs completions that differ between prompts"
    )


def with_mismatched(rows: Dataset, *, max_length: int | None, seed: int) -> Dataset:
    """Tokenised rows of one completion each, a mismatched one put beside it and cut to ``max_length``.

    Args:
        rows: With ``prompt_ids`` and one list in ``completion_ids``.
        max_length: Tokens of prompt + completion at most.
        seed: Of the choice.

    Returns:
        The rows with two lists in ``completion_ids``: the same for the same rows and seed, in every process.

    Raises:
        ValueError: If a row has no partner.
    """
    partner = mismatch(_numbered(rows, "prompt_ids"), _numbered(rows, "completion_ids"), seed=seed)

    def add(batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        others = rows.select_columns(["completion_ids"])[partner[list(indices)]]["completion_ids"]
        rooms = [None if max_length is None else max_length - len(prompt) for prompt in batch["prompt_ids"]]
        cut = [other[0][:room] for other, room in zip(others, rooms, strict=True)]
        return {
            "completion_ids": [
                [*own, other] for own, other in zip(batch["completion_ids"], cut, strict=True)
            ],
            "num_tokens": [n + len(other) for n, other in zip(batch["num_tokens"], cut, strict=True)],
        }

    settings = f"{rows._fingerprint} mismatched {VERSION} {max_length} {seed}"
    return rows.map(
        add,
        with_indices=True,
        batched=True,
        batch_size=500,
        features=rows.features,
        new_fingerprint=hashlib.sha256(settings.encode()).hexdigest()[:32],
        desc="Mismatched completions",
    )


def _numbered(rows: Dataset, column: str) -> list[int]:
    """A number for each row, the same where a column holds the same."""
    known: dict[bytes, int] = {}
    digests = (
        hashlib.sha256(repr(value).encode()).digest()
        for batch in rows.select_columns([column]).iter(1000)
        for value in batch[column]
    )
    return [known.setdefault(digest, len(known)) for digest in digests]
