"""From rows of a tokenised data set to a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack

# Columns of a tokenised data set that travel along with a group.
EXTRAS = ("margin", "label")


class PackCollator:
    """Make a :class:`PackedBatch` of tokenised rows: the ``collate_fn`` of any ``DataLoader`` over them.

    Rows come as a list of rows, as a ``DataLoader`` with a batch size hands them over, or as one dictionary of
    columns, as a ``datasets.Dataset`` answers when asked for a list of rows.

    Example:
        >>> rows = [{"prompt_ids": [5, 6], "completion_ids": [[7], [8, 9]], "row_id": 3}]
        >>> batch = PackCollator()(rows)
        >>> batch.input_ids.tolist(), batch.row_ids
        ([5, 6, 7, 8, 9], (3,))
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> PackedBatch:
        """The batch."""
        if isinstance(rows, Mapping):
            columns = list(rows)
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        return pack(group_of(row) for row in rows)


def group_of(row: Mapping[str, Any]) -> PromptGroup:
    """The prompt group of one tokenised row."""
    return PromptGroup(
        prompt=row["prompt_ids"],
        completions=row["completion_ids"],
        masks=row.get("completion_masks"),
        row_id=row.get("row_id", -1),
        ranks=row.get("ranks"),
        extras={name: row[name] for name in EXTRAS if name in row},
    )
