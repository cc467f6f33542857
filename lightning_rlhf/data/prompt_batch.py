"""Prompts to be answered, with what the data says about each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_rlhf.data.prompts import Text


@dataclass(eq=False)  # not frozen: Lightning's precision plugins refuse frozen dataclasses in a batch
class PromptBatch:
    """Prompts without completions, on the host: what is sampled from them becomes a :class:`PackedBatch`.

    Attributes:
        prompt_ids: Token ids of each prompt, P lists.
        texts: The text of each prompt, by the chat template where it is a conversation; whole, even where the ids
            were cut.
        prompts: Each prompt as the data has it: text, or messages.
        columns: The data's other columns, each a list of P values: what reward functions are given.
        row_ids: P integers, the row of each prompt in its tokenised data.
    """

    prompt_ids: tuple[list[int], ...]
    texts: tuple[str, ...]
    prompts: tuple[Text, ...]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    row_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        """P, the number of prompts."""
        return len(self.prompt_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptBatch":
        """The batch itself, for Lightning to "move": nothing of it is on a device."""
        return self


class PromptCollator:
    """Make a :class:`PromptBatch` of tokenised prompts: the ``collate_fn`` of any ``DataLoader`` over them.

    Rows come as a list of rows, or as one dictionary of columns, as for :class:`PackCollator`.

    Example:
        >>> rows = [{"prompt_ids": [5, 6], "text": "2 + 2", "messages": None, "columns": {"answer": 4}, "row_id": 3}]
        >>> batch = PromptCollator()(rows)
        >>> batch.prompt_ids, batch.texts, batch.columns, batch.row_ids
        (([5, 6],), ('2 + 2',), {'answer': [4]}, (3,))
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> PromptBatch:
        """The batch."""
        if isinstance(rows, Mapping):
            names = list(rows)
            rows = [dict(zip(names, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        others = [row.get("columns") or {} for row in rows]
        return PromptBatch(
            prompt_ids=tuple(list(row["prompt_ids"]) for row in rows),
            texts=tuple(row["text"] for row in rows),
            prompts=tuple(json.loads(row["messages"]) if row["messages"] else row["text"] for row in rows),
            columns={name: [other[name] for other in others] for name in others[0]},
            row_ids=tuple(row["row_id"] for row in rows),
        )
