"""Token heads: what a reward model learns beside its score, so that a fault is found where it stands."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_rlhf import functional as RF
from lightning_rlhf.models.scorer import ScoreHead


@dataclass(frozen=True)
class TokenHead:
    r"""A second head that gives every token of a completion a reward of its own; only while a reward model is trained.

    The sum $\tilde s(y) = \sum_t v \cdot h_t$ is fitted to the same comparisons (Yang et al., 2023,
    "Preference-grounded Token-level Guidance for Language Model Fine-tuning"), and the score is drawn to it:

    $\text{coef} \cdot \text{loss}(\tilde s) + \text{agreement\_coef} \cdot (\Delta s - \Delta \tilde s)^2$ for every
    comparison, no gradient reaching $\tilde s$ by the second term. One wrong word among many is seen by the head that
    reads that word, and lost on one that reads the end only.

    Attributes:
        coef: Weight of the ranking loss of the sums.
        agreement_coef: Weight of the squared difference of the two margins.
    """

    coef: float = 1.0
    agreement_coef: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what can only be a slip."""
        if self.coef <= 0:
            raise ValueError(
                f"token_head.coef must be positive, got {self.coef}; token_head: null is without"
            )
        if self.agreement_coef < 0:
            raise ValueError(f"token_head.agreement_coef must be at least 0, got {self.agreement_coef}")


class TokenHeads(nn.Module):
    """One token head for each member of a reward model.

    Args:
        settings: Weights of the losses.
        heads: The members' own heads.
    """

    def __init__(self, settings: TokenHead, heads: Sequence[ScoreHead]) -> None:
        super().__init__()
        self.settings = settings
        self.heads = nn.ModuleList(ScoreHead(head.weight.shape[1]) for head in heads)
        for head in self.heads:
            head.weight.data.div_(10)  # type: ignore[operator]  # a sum over many tokens starts small

    def sums(self, tokens: Sequence[Tensor], lengths: Tensor) -> Tensor:
        """The sum of every completion's token rewards, ``(members, N)``.

        Args:
            tokens: Hidden states of all tokens of all completions, one tensor a member.
            lengths: Tokens of each completion, ``(N,)``.
        """
        return torch.stack(
            [
                RF.sum_by_sequence(head(hidden), lengths)
                for head, hidden in zip(self.heads, tokens, strict=True)
            ]
        )

    def losses(self, lead: Tensor, lead_of_sums: Tensor, margin: Tensor | None) -> Tensor:
        """What is added to the loss of every comparison, ``(members, C)``.

        Args:
            lead: Scores of the better completions less those of the worse, ``(members, C)``.
            lead_of_sums: The same of :meth:`sums`.
            margin: By which the better one should lead at least, ``(C,)``.
        """
        nothing = torch.zeros_like(lead_of_sums)
        fitted = self.settings.coef * RF.bradley_terry_loss(lead_of_sums, nothing, margin)
        return fitted + self.settings.agreement_coef * (lead - lead_of_sums.detach()).square()
