"""What became of the rows of a data set."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SplitReport:
    """What became of the rows of one split.

    Attributes:
        name: Of the source.
        rows: Rows read.
        dropped: Rows dropped, by reason.
        prompts_truncated: Prompts cut from the left.
        completions_truncated: Completions cut from the right.
        tokens: Tokens of all groups, each prompt once.
        notes: What else is worth knowing.
    """

    name: str
    rows: int
    dropped: dict[str, int] = field(default_factory=dict)
    prompts_truncated: int = 0
    completions_truncated: int = 0
    tokens: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for people."""
        total = sum(self.dropped.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        parts = [
            f"{self.rows:,} rows read from {self.name}, {total:,} dropped"
            + (f" ({reasons})" if total else ""),
            f"{self.prompts_truncated:,} prompts and {self.completions_truncated:,} completions truncated",
            f"{self.tokens:,} tokens",
            *self.notes,
        ]
        return "; ".join(parts)
