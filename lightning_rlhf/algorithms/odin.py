"""ODIN: reward models whose length heads take what is only length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_rlhf import functional as RF
from lightning_rlhf.models.scorer import ScoreHead


@dataclass(frozen=True)
class ODIN:
    """A length head beside each member's own (Chen et al., 2024, "ODIN"); only while a reward model is trained.

    Attributes:
        length_coef: Weight of :func:`~lightning_rlhf.functional.odin_length_loss`.
        orthogonal_coef: Weight of :func:`~lightning_rlhf.functional.odin_orthogonality`.
    """

    length_coef: float = 1.0
    orthogonal_coef: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        for name in ("length_coef", "orthogonal_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"odin.{name} must be at least 0, got {getattr(self, name)}")


class LengthHeads(nn.Module):
    """One length head for each member of a reward model.

    Args:
        settings: Weights of the losses.
        heads: The members' own heads.
    """

    def __init__(self, settings: ODIN, heads: Sequence[ScoreHead]) -> None:
        super().__init__()
        self.settings = settings
        self.heads = nn.ModuleList(ScoreHead(head.weight.shape[1]) for head in heads)

    def scores(self, ends: Sequence[Tensor]) -> Tensor:
        """What is only length, ``(members, N)``, of hidden states ``(N, d)`` a member."""
        return torch.stack([head(end) for head, end in zip(self.heads, ends, strict=True)])

    def penalties(
        self, quality: Tensor, length_scores: Tensor, lengths: Tensor, heads: Sequence[ScoreHead]
    ) -> Tensor:
        """The weighted length and orthogonality losses, ``(members,)``.

        Args:
            quality: Scores of the members' own heads, ``(members, N)``.
            length_scores: Those of the length heads, ``(members, N)``.
            lengths: In tokens, ``(N,)``.
            heads: The members' own heads.
        """
        return torch.stack(
            [
                self.settings.length_coef * RF.odin_length_loss(own_scores, of_length, lengths)
                + self.settings.orthogonal_coef * RF.odin_orthogonality(own.weight, beside.weight)  # type: ignore[arg-type]
                for own_scores, of_length, own, beside in zip(
                    quality, length_scores, heads, self.heads, strict=True
                )
            ]
        )
