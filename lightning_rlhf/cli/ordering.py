"""How well a reward model orders held-out pairs, beside the best that anything could do."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L

from lightning_rlhf.algorithms import RewardModel
from lightning_rlhf.data import PreferenceDataModule
from lightning_rlhf.functional import wilson_interval
from lightning_rlhf.sandbox.annotator import best_accuracy


@dataclass(frozen=True)
class Ordering:
    """What was measured on pairs that a reward model was not trained on.

    Attributes:
        num_pairs: How many.
        accuracy: Share ordered as an annotator did, ties as half.
        lower: End of its 95% interval (Wilson).
        upper: The other end.
        best: The best reachable accuracy on these pairs, from the annotators' probabilities.
        longer_wins: The accuracy of preferring the longer answer.
        calibration_error: Of σ(margin).
        length_correlation: Of rewards and lengths in tokens.
    """

    num_pairs: int
    accuracy: float
    lower: float
    upper: float
    best: float
    longer_wins: float
    calibration_error: float
    length_correlation: float

    def __str__(self) -> str:
        """In words."""
        return (
            f"right on {self.accuracy:.1%} ({self.lower:.1%} to {self.upper:.1%}) of {self.num_pairs:,} held-out "
            f"pairs; the best reachable is {self.best:.1%}, preferring the longer answer gives {self.longer_wins:.1%}; "
            f"calibration error {self.calibration_error:.3f}; correlation of reward and length "
            f"{self.length_correlation:+.2f}"
        )


def judge(checkpoint: Path, pairs: Path, probabilities: Sequence[float]) -> Ordering:
    """Evaluate a reward model on pairs.

    Args:
        checkpoint: Of the trained model, with its scores as it learnt them: those of its export are in another unit,
            and then σ(margin) is no probability.
        pairs: A file of preferences.
        probabilities: For each of them, that an annotator prefers the first of two answers.

    Returns:
        The measurements.
    """
    module = RewardModel.load_from_checkpoint(checkpoint, weights_only=True)
    data = PreferenceDataModule(test=str(pairs), batch_size=32)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    found = trainer.test(module, datamodule=data, verbose=False)[0]
    count, accuracy = len(probabilities), found["test/accuracy"]
    lower, upper = wilson_interval(accuracy * count, count)
    return Ordering(
        num_pairs=count,
        accuracy=accuracy,
        lower=lower.item(),
        upper=upper.item(),
        best=best_accuracy(probabilities),
        longer_wins=found["test/longer_wins"],
        calibration_error=found["test/calibration_error"],
        length_correlation=found["test/length_correlation"],
    )
