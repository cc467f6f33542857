"""The sandbox's gold and its annotators as rewards: to be watched, or to label."""

import hashlib
from math import log
from random import Random

import torch
from torch import Tensor

from lightning_rlhf.rewards import Reward, Samples
from lightning_rlhf.sandbox.annotator import Annotator
from lightning_rlhf.sandbox.world import World


class GoldReward(Reward):
    """What an answer is really worth, by rule.

    Args:
        seed: Of the world.
        name: What its values are logged under.

    Example:
        >>> row = World(0).demonstrations(1)[0]
        >>> samples = Samples([row["prompt"]], [row["completion"]], [[5]], [[6]], [False])
        >>> abs(GoldReward(0)(samples).item() - World(0).gold(row["prompt"], row["completion"])) < 1e-6
        True
    """

    def __init__(self, seed: int = 0, name: str = "gold") -> None:
        super().__init__(name)
        self.world = World(seed)

    def forward(self, samples: Samples) -> Tensor:
        """The gold reward of each sample, ``(N,)``."""
        rows = zip(samples.prompts, samples.completions, samples.truncated, strict=True)
        return torch.tensor([self.world.gold(str(p), text, truncated=cut) for p, text, cut in rows])


class AnnotatorReward(Reward):
    r"""What one annotator, asked once, makes of an answer: utility / temperature, and Gumbel noise.

    Of two answers the higher one wins with the probability that :meth:`Annotator.probability` gives. The noise is drawn
    by seed and text: the same answer gets the same value again.

    Args:
        seed: Of the world.
        draw: Of the noise: another annotator.
        length_bias: See :class:`Annotator`.
        flattery_bias: See :class:`Annotator`.
        format_bias: See :class:`Annotator`.
        noisy: Whether there is noise; without, it is what all annotators agree on, utility / temperature.
        name: What its values are logged under.
    """

    def __init__(
        self,
        seed: int = 0,
        draw: int = 0,
        length_bias: float = 0.02,
        flattery_bias: float = 0.4,
        format_bias: float = 0.2,
        noisy: bool = True,
        name: str = "annotator",
    ) -> None:
        super().__init__(name)
        self.draw, self.noisy = draw, noisy
        self.annotator = Annotator(
            World(seed), length_bias=length_bias, flattery_bias=flattery_bias, format_bias=format_bias
        )

    def forward(self, samples: Samples) -> Tensor:
        """One value per sample, ``(N,)``."""
        rows = zip(samples.prompts, samples.completions, samples.truncated, strict=True)
        return torch.tensor([self._value(str(prompt), text, truncated=cut) for prompt, text, cut in rows])

    def _value(self, prompt: str, text: str, *, truncated: bool) -> float:
        value = self.annotator.utility(prompt, text, truncated=truncated) / self.annotator.temperature
        if not self.noisy:
            return value
        digest = hashlib.blake2b(f"{self.draw}:{prompt}:{text}".encode(), digest_size=8).digest()
        noise = -log(Random(int.from_bytes(digest, "big")).expovariate(1))
        return value + noise
