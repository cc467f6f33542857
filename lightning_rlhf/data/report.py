"""What became of the rows of a data set, and what was wrong with one."""

from dataclasses import dataclass, field


class BadRow(ValueError):
    """A row that cannot be used.

    Attributes:
        reason: A few words, the same for all rows of this kind: what dropped rows are counted by.
        detail: Column, problem and remedy.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


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
