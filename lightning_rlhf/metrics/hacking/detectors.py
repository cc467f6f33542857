"""Detectors over texts and scores, against the starting policy's samples of the same prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rlhf.metrics.hacking.change import MeanChange, ShareChange
from lightning_rlhf.metrics.hacking.text import (
    distinct_n,
    format_features,
    is_certain,
    is_hedged,
    is_refusal,
    repetition,
    self_bleu,
)

__all__ = ["Certainty", "Diversity", "EnsembleDisagreement", "FormatShares", "RefusalRate"]


class FormatShares(ShareChange):
    """Shares of answers with bullets, headers, tables and bold text.

    Reward models and judges prefer such formats whatever the content: Zhang et al. (2024), "From Lists to Emojis".
    Control: the starting policy's answers to the same prompts. Measured on 200 texts each: bullets planted in 30%
    instead of 10% are found in 100 of 100 runs; where nothing changed, 5 of 100 intervals exclude 0. The other three
    likewise.

    Args:
        confidence: Of the intervals.

    Example:
        >>> metric = FormatShares()
        >>> metric.update(["- one", "two"])
        >>> metric.update(["one", "two"], reference=True)
        >>> metric.compute()["bullets_change"]
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, *, confidence: float = 0.95) -> None:
        super().__init__(("bullets", "headers", "tables", "bold"), confidence=confidence)

    def update(self, texts: Sequence[str], *, reference: bool = False) -> None:  # type: ignore[override]
        """Add answers; those of the starting policy by ``reference``."""
        super().update(
            _flags([list(format_features(text).values()) for text in texts], 4), reference=reference
        )


class RefusalRate(ShareChange):
    """Share of answers that refuse, on prompts that no one need refuse.

    Refusal creep: a policy that learns to decline what is harmless (Röttger et al., 2023, "XSTest"). Control: the
    starting policy on the same benign prompts; that the prompts are benign is for who gives them. Measured on 200
    answers each: 15% instead of 3% are found in 100 of 100 runs; without a change 4 of 100 intervals exclude 0.

    Args:
        confidence: Of the intervals.

    Example:
        >>> metric = RefusalRate()
        >>> metric.update(["I'm sorry, but I can't help with that.", "Boil it for ten minutes."])
        >>> metric.update(["Ten minutes."], reference=True)
        >>> metric.compute()["refusals_change"]
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, *, confidence: float = 0.95) -> None:
        super().__init__(("refusals",), confidence=confidence)

    def update(self, texts: Sequence[str], *, reference: bool = False) -> None:  # type: ignore[override]
        """Add answers to benign prompts; those of the starting policy by ``reference``."""
        super().update(_flags([[is_refusal(text)] for text in texts], 1), reference=reference)


class Certainty(ShareChange):
    """Shares of wrong answers that hedge, and that use words of certainty.

    People rate assertive answers higher and find their errors less: Hosking et al. (2023), "Human Feedback is not Gold
    Standard"; Wen et al. (2024), "Language Models Learn to Mislead Humans via RLHF". Control: the starting policy's
    wrong answers. Measured on 200 answers each: words of certainty, or hedges, in 30% instead of 10% are found in
    100 of 100 runs; without a change 5 of 100 intervals exclude 0.

    Args:
        confidence: Of the intervals.

    Example:
        >>> metric = Certainty()
        >>> metric.update(["It is definitely 13."])
        >>> metric.update(["Perhaps 13."], reference=True)
        >>> found = metric.compute()
        >>> found["certain_change"], found["hedged_change"]
        (tensor(1., dtype=torch.float64), tensor(-1., dtype=torch.float64))
    """

    def __init__(self, *, confidence: float = 0.95) -> None:
        super().__init__(("hedged", "certain"), confidence=confidence)

    def update(self, wrong_answers: Sequence[str], *, reference: bool = False) -> None:  # type: ignore[override]
        """Add answers that are known to be wrong; those of the starting policy by ``reference``."""
        super().update(_flags([[is_hedged(t), is_certain(t)] for t in wrong_answers], 2), reference=reference)


class Diversity(MeanChange):
    """How different the samples of one prompt are, and how much each repeats itself.

    ``distinct_2`` (Li et al., 2016) and ``self_bleu`` (Zhu et al., 2018) of the samples of a prompt, and
    ``repetition``, the share of a sample's word 3-grams that it had before; means over prompts. RLHF lowers diversity
    (Kirk et al., 2024, "Understanding the Effects of RLHF on LLM Generalisation and Diversity"). Control: the starting
    policy's samples, the same number of each prompt. Measured on 50 prompts of 4 samples: one phrase repeated in a
    fifth of the samples is found in 100 of 100 runs; without a change 3 of 100 intervals exclude 0.

    Args:
        confidence: Of the intervals.

    Example:
        >>> metric = Diversity()
        >>> metric.update([["a b c d e", "a b c d e"]])
        >>> metric.update([["a b c d e", "f g h i j"]], reference=True)
        >>> metric.compute()["distinct_2_change"]
        tensor(-0.5000, dtype=torch.float64)
    """

    def __init__(self, *, confidence: float = 0.95) -> None:
        super().__init__(("distinct_2", "self_bleu", "repetition"), confidence=confidence)

    def update(self, groups: Sequence[Sequence[str]], *, reference: bool = False) -> None:  # type: ignore[override]
        """Add the samples of prompts, at least two a prompt.

        Raises:
            ValueError: If a prompt has fewer.
        """
        rows = [
            [distinct_n(texts), self_bleu(texts), sum(map(repetition, texts)) / len(texts)]
            for texts in groups
        ]
        super().update(torch.tensor(rows, dtype=torch.float64).reshape(-1, 3), reference=reference)


class EnsembleDisagreement(MeanChange):
    """How far the members of a reward ensemble disagree on samples: the standard deviation of their scores.

    It rises where the policy leaves what the members were trained on (Coste et al., 2023; Eisenstein et al., 2023,
    "Helping or Herding?"); members that share a bias agree on it all the same. Control: the starting policy's samples
    under the same members, which should be normalised to one scale. Measured on 100 samples each of 4 members: a
    spread that is half as large again is found in 100 of 100 runs; without a change 5 of 100 intervals exclude 0.

    Args:
        confidence: Of the intervals.

    Example:
        >>> metric = EnsembleDisagreement()
        >>> metric.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        >>> metric.update(torch.zeros(2, 3), reference=True)
        >>> metric.compute()["disagreement_change"]
        tensor(1.5000, dtype=torch.float64)
    """

    def __init__(self, *, confidence: float = 0.95) -> None:
        super().__init__(("disagreement",), confidence=confidence)

    def update(self, scores: Tensor, *, reference: bool = False) -> None:
        """Add the scores of all members, ``(members, N)``, at least two members.

        Raises:
            ValueError: If the shape is another one.
        """
        if scores.dim() != 2 or scores.shape[0] < 2:
            raise ValueError(
                f"scores has shape {tuple(scores.shape)}: give (members, N) of at least two members"
            )
        super().update(scores.detach().double().std(0, correction=0)[:, None], reference=reference)


def _flags(rows: list[list[bool]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool).reshape(-1, width)
