"""Sampled completions with what is known of them: what every reward is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.data.prompts import Text

_SHOWN = 60  # characters of a text in a message


@dataclass(frozen=True)
class Samples:
    """Sampled completions, what a reward is of. N of them; several may be of one prompt.

    Attributes:
        prompts: Text or messages, as the data had them.
        completions: Text, without special tokens.
        prompt_ids: Token ids of the prompts, as the policy saw them.
        completion_ids: Token ids as sampled, the end-of-sequence token included where there is one.
        truncated: Whether a completion was cut off before it ended.
        columns: The data's extra columns, one value per sample.

    Raises:
        ValueError: If something has another length than ``prompts``.

    Example:
        >>> samples = Samples(["Hi"], ["Yo"], [[5]], [[6, 2]], [False], {"answer": ["42"]})
        >>> len(samples), samples.lengths
        (1, tensor([2]))
    """

    prompts: Sequence[Text]
    completions: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    truncated: Sequence[bool]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lists = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "columns"}
        for name, values in {**lists, **{f"columns[{k!r}]": v for k, v in self.columns.items()}}.items():
            if len(values) != len(self):
                raise ValueError(
                    f"{name} has {len(values)} values for {len(self)} prompts: give one per sample"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, ``(N,)``."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.long)

    def select(self, indices: Sequence[int]) -> "Samples":
        """Those at some places, in that order.

        Example:
            >>> Samples(["a", "b"], ["x", "y"], [[1], [2]], [[3], [4]], [False, True]).select([1]).completions
            ['y']
        """

        def pick(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in indices]

        return Samples(
            pick(self.prompts),
            pick(self.completions),
            pick(self.prompt_ids),
            pick(self.completion_ids),
            pick(self.truncated),
            {name: pick(values) for name, values in self.columns.items()},
        )


def shown(text: Text) -> str:
    """The beginning of a text, or the end of a conversation, for a message.

    Example:
        >>> shown("Hello"), shown([{"role": "user", "content": "Hi"}])
        ("'Hello'", "'Hi'")
    """
    plain = text if isinstance(text, str) else str(text[-1].get("content")) if text else ""
    return repr(plain if len(plain) <= _SHOWN else plain[:_SHOWN] + "…")
