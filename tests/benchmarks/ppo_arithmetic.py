"""What an iteration of PPO costs by its tokens: ``python -m tests.benchmarks.ppo_arithmetic ASSETS``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.ppo import NUM_EPOCHS
from tests.benchmarks.ppo_sides import NEW_TOKENS, ROLLOUT_FORWARD
from tests.benchmarks.workload import HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, load_prompts

BODY = 2 * LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
"""FLOPs of the layers a token, attention's products apart."""
HEAD = 2 * HIDDEN * VOCABULARY


@dataclass(frozen=True)
class Cost:
    """Of one iteration.

    Attributes:
        tokens: That a forward over the whole rollout computes, padding included.
        generation: FLOPs of sampling.
        scoring: Of what is computed of the samples once.
        update: Of all epochs.
    """

    tokens: int
    generation: float
    scoring: float
    update: float

    @property
    def total(self) -> float:
        """FLOPs of the iteration."""
        return self.generation + self.scoring + self.update


def body(lengths: Sequence[int]) -> float:
    """FLOPs of a forward of the layers over rows of these lengths, causal attention included."""
    return sum(BODY * n + 2 * HIDDEN * LAYERS * n * n for n in lengths)


def sampling(widths: Sequence[int]) -> float:
    """FLOPs of the prompts, each as wide as its batch is padded to, and of the new tokens."""
    return body(widths) + len(widths) * NEW_TOKENS * (BODY + HEAD)


def ours(prompts: Sequence[int], *, adapters: bool) -> Cost:
    """Policy, reference, critic and reward without padding; the vocabulary where a completion's token is predicted."""
    passes = 2 if adapters else 3  # a frozen weight has no gradient
    forward = body([n + NEW_TOKENS for n in prompts])
    head = len(prompts) * NEW_TOKENS * HEAD
    longest_first = sorted(prompts, reverse=True)
    widths = [longest_first[at - at % ROLLOUT_FORWARD] for at in range(len(prompts))]
    return Cost(
        sum(prompts) + len(prompts) * NEW_TOKENS,
        sampling(widths),
        4 * forward + 2 * head,
        NUM_EPOCHS * passes * (2 * forward + head),
    )


def trl(prompts: Sequence[int], *, adapters: bool) -> Cost:
    """Every prompt as wide as the longest, the vocabulary at every position, the old policy's taken from sampling."""
    passes = 2 if adapters else 3
    width = max(prompts)
    forward = body([width + NEW_TOKENS] * len(prompts))
    tokens = len(prompts) * (width + NEW_TOKENS)
    return Cost(
        tokens,
        sampling([width] * len(prompts)),
        3 * forward + tokens * HEAD,
        NUM_EPOCHS * (passes * (forward + tokens * HEAD) + 3 * forward),  # its value model is trained in full
    )


def main(assets: Path) -> None:
    """Print the first two batches of 8 and of 32 prompts, which the benchmark measures the second of."""
    for size in (8, 32):
        for at, batch in enumerate(load_prompts(assets, 2, size)):
            prompts = [len(group.prompt) for group in batch]
            for adapters in (False, True):
                mine, theirs = ours(prompts, adapters=adapters), trl(prompts, adapters=adapters)
                print(
                    f"{size} prompts, batch {at}, {'adapters' if adapters else 'models'}: tokens {mine.tokens:,} / "
                    f"{theirs.tokens:,}, TFLOP {mine.total / 1e12:.1f} / {theirs.total / 1e12:.1f}, "
                    f"ratio {theirs.total / mine.total:.2f}"
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
