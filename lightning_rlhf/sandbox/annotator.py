"""Annotators: people who mostly see what is good, are fooled a little, and do not always agree."""

from collections.abc import Sequence
from math import exp, log, sqrt
from random import Random

from lightning_rlhf.sandbox.world import World

_REFERENCE_PAIRS = 3_000


class Annotator:
    r"""Draws preferences by Bradley–Terry: P(a ≻ b) = σ((u(a) − u(b)) / temperature).

    Three quantities are to be kept apart:

    - **gold** (:meth:`World.gold`): what an answer is worth. Nobody who takes part in training sees it.
    - **utility** u (:meth:`utility`): what annotators see: gold, plus a liking for length, flattery and bullets.
    - **proxy**: what a reward model has learnt from the annotators' choices; it is no part of the sandbox.

    A policy that follows the utility loses gold to the biases; one that follows a proxy loses more, to its errors.

    The temperature is solved for: on 3,000 reference pairs of the world, two independent annotators make the same
    choice of a pair with probability E[p² + q²] = ``agreement`` (q = 1 − p). No predictor of single choices can
    then be right more often than E[max(p, q)]: see :func:`best_accuracy`.

    Args:
        world: Where gold and the reference pairs come from.
        length_bias: Utility of each token.
        flattery_bias: Utility of each sentence that flatters.
        format_bias: Utility of each bulleted line.
        agreement: How often two annotators agree: above 0.5, below 1.

    Attributes:
        temperature: Divides differences of utility.
        agreement: Of two annotators on the reference pairs, as computed.
        best_accuracy: The best that a predictor can reach on the reference pairs.

    Raises:
        ValueError: No temperature gives this agreement.
    """

    def __init__(
        self,
        world: World,
        *,
        length_bias: float = 0.02,
        flattery_bias: float = 0.4,
        format_bias: float = 0.2,
        agreement: float = 0.78,
    ) -> None:
        if not 0.5 < agreement < 1:
            raise ValueError(f"agreement must be above 0.5 and below 1, got {agreement}")
        self.world = world
        self.length_bias = length_bias
        self.flattery_bias = flattery_bias
        self.format_bias = format_bias
        pairs = world.pairs(_REFERENCE_PAIRS, seed=-1)
        margins = [self.utility(prompt, a) - self.utility(prompt, b) for prompt, a, b in pairs]
        self.temperature = _solve_temperature(margins, agreement)
        probabilities = [_sigmoid(margin / self.temperature) for margin in margins]
        self.agreement = mean_agreement(probabilities)
        self.best_accuracy = best_accuracy(probabilities)

    def utility(self, prompt: str, completion: str, *, truncated: bool = False) -> float:
        """What an answer seems to be worth: gold, and what annotators like besides."""
        report = self.world.report(prompt, completion, truncated=truncated)
        likes = self.flattery_bias * report.flattery + self.format_bias * report.bullets
        return report.score + self.length_bias * report.tokens + likes

    def probability(self, prompt: str, a: str, b: str) -> float:
        """Probability that an annotator prefers answer a to answer b."""
        return _sigmoid((self.utility(prompt, a) - self.utility(prompt, b)) / self.temperature)

    def rank(self, prompt: str, answers: Sequence[str], rng: Random) -> list[str]:
        """Sort answers as one annotator would, the best first (Plackett–Luce).

        Each has its utility / temperature and Gumbel noise. So any two of them come in the order that
        :meth:`probability` gives, however many others there are.

        Args:
            prompt: A prompt of the sandbox.
            answers: To sort.
            rng: Where the noise comes from.
        """
        noisy = [self.utility(prompt, a) / self.temperature - log(rng.expovariate(1)) for a in answers]
        order = sorted(range(len(answers)), key=noisy.__getitem__, reverse=True)
        return [answers[place] for place in order]


def mean_agreement(probabilities: Sequence[float]) -> float:
    """How often two independent annotators make the same choice: E[p² + (1 − p)²].

    Args:
        probabilities: Of each pair, that an annotator prefers its first answer.

    >>> round(mean_agreement([0.9, 0.5]), 6)  # (0.82 + 0.5) / 2
    0.66
    """
    return sum(p * p + (1 - p) * (1 - p) for p in probabilities) / len(probabilities)


def best_accuracy(probabilities: Sequence[float]) -> float:
    """How often the best predictor is right about a single annotator: E[max(p, 1 − p)].

    Args:
        probabilities: Of each pair, that an annotator prefers its first answer.

    >>> round(best_accuracy([0.9, 0.5]), 6)  # (0.9 + 0.5) / 2
    0.7
    """
    return sum(max(p, 1 - p) for p in probabilities) / len(probabilities)


def _solve_temperature(margins: Sequence[float], agreement: float) -> float:
    """Bisection on the logarithm: agreement falls as the temperature rises."""
    cold, hot = 1e-3, 1e3
    for _ in range(32):
        middle = sqrt(cold * hot)
        agreed = mean_agreement([_sigmoid(margin / middle) for margin in margins])
        cold, hot = (middle, hot) if agreed > agreement else (cold, middle)
    if log(hot / 1e-3) < 1e-6:
        raise ValueError(f"no temperature makes annotators agree on {agreement:.0%}: too many pairs are ties")
    return cold


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x >= 0 else 1 - 1 / (1 + exp(x))
