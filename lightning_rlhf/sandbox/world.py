"""The world of the sandbox: prompts, demonstrations and preferences, drawn by seed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, cycle, islice
from random import Random
from typing import TYPE_CHECKING, Literal

from lightning_rlhf.sandbox.gold import GoldReport, gold_report
from lightning_rlhf.sandbox.language import ASPECTS, CATEGORY_OF, Question, parse_prompt
from lightning_rlhf.sandbox.writing import Style, contestant, demonstrator, write

if TYPE_CHECKING:
    from lightning_rlhf.sandbox.annotator import Annotator

Split = Literal["train", "val"]


class World:
    r"""A tiny task with a known gold reward: tell what was asked about a living thing, and nothing else.

    A prompt names a topic and two to five of its eight aspects. There are 16 × 210 = 3,360 such questions; a fifth
    of them, chosen by the seed, is held out. A question is held out with all orders of its aspects, so training and
    validation never share one; they do share topics, aspects and facts, which is what makes the task learnable.

    Everything is drawn from ``seed``, and from the ``seed`` of each method on top: the same two give the same
    rows on every machine, and a longer draw begins with the rows of a shorter one. The language itself, and so
    the tokenizer, does not depend on the seed.

    Args:
        seed: Which world.

    >>> world = World(seed=0)
    >>> world.gold("Tell me about the robin: food and home.\n", "The robin eats seeds. What a great question.")
    1.0
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        asked = [aspects for size in range(2, 6) for aspects in combinations(ASPECTS, size)]
        questions = [Question(topic, aspects) for topic in CATEGORY_OF for aspects in asked]
        self._rng("split").shuffle(questions)
        held_out = len(questions) // 5
        self._questions: dict[Split, list[Question]] = {
            "train": questions[held_out:],
            "val": questions[:held_out],
        }

    def _rng(self, *purpose: object) -> Random:
        """A stream of its own for each purpose: seeded by a text, it is the same on every machine."""
        return Random("/".join(map(str, (self.seed, *purpose))))

    def report(self, prompt: str, completion: str, *, truncated: bool = False) -> GoldReport:
        """What the gold reward is made of; see :func:`gold_report`."""
        return gold_report(prompt, completion, truncated=truncated)

    def gold(self, prompt: str, completion: str, *, truncated: bool = False) -> float:
        """The gold reward of an answer; see :func:`gold_report`."""
        return self.report(prompt, completion, truncated=truncated).score

    def prompts(self, n: int, split: Split = "train", seed: int = 0) -> list[str]:
        """Draw prompts. The first 2,688 of ``train``, and the first 672 of ``val``, ask different questions.

        Args:
            n: How many.
            split: ``train`` or ``val``: no question of one is in the other.
            seed: Which draw.
        """
        if split not in self._questions:
            raise ValueError(f"split must be 'train' or 'val', got {split!r}")
        rng = self._rng("prompts", split, seed)
        questions = list(self._questions[split])
        rng.shuffle(questions)
        drawn = islice(cycle(questions), n)
        return [str(Question(q.topic, tuple(rng.sample(q.aspects, len(q.aspects))))) for q in drawn]

    def demonstrations(self, n: int, split: Split = "train", seed: int = 0) -> list[dict[str, str]]:
        """Draw prompts with an answer of mixed quality: facts left out, drift, repetition, flattery.

        Returns:
            Rows ``{"prompt": …, "completion": …}``.
        """
        rng = self._rng("demonstrations", split, seed)
        prompts = self.prompts(n, split, seed)
        return [{"prompt": prompt, "completion": _answer(prompt, demonstrator, rng)} for prompt in prompts]

    def pairs(self, n: int, split: Split = "train", seed: int = 0) -> list[tuple[str, str, str]]:
        """Draw prompts with two different answers, of which nobody has said yet which is better.

        The two are by two writers who may differ much, from excellent to poor; about one answer in seven has a
        slip that makes it malformed, so that there is something to learn of that.

        Returns:
            Triples (prompt, answer, answer).
        """
        rng = self._rng("pairs", split, seed)
        found = []
        for prompt in self.prompts(n, split, seed):
            first = second = _answer(prompt, contestant, rng)
            while second == first:
                second = _answer(prompt, contestant, rng)
            found.append((prompt, first, second))
        return found

    def preferences(
        self, n: int, annotator: Annotator, split: Split = "train", seed: int = 0
    ) -> list[dict[str, str]]:
        """Draw :meth:`pairs` and let an annotator say, once for each, which answer is better.

        Returns:
            Rows ``{"prompt": …, "chosen": …, "rejected": …}``.
        """
        rng = self._rng("labels", split, seed)
        rows = []
        for prompt, first, second in self.pairs(n, split, seed):
            wins = rng.random() < annotator.probability(prompt, first, second)
            chosen, rejected = (first, second) if wins else (second, first)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        return rows

    def rankings(
        self,
        n: int,
        annotator: Annotator,
        num_completions: int = 6,
        split: Split = "train",
        seed: int = 0,
        *,
        writer: Callable[[Random], Style] = contestant,
    ) -> list[dict[str, str | list[str]]]:
        """Draw prompts with several different answers, and let an annotator sort each prompt's, once.

        For a reward model: K answers make K (K − 1) / 2 comparisons.

        Args:
            n: How many prompts.
            annotator: Who sorts.
            num_completions: Answers to each prompt.
            split: ``train`` or ``val``.
            seed: Which draw.
            writer: Whose answers, other than those of :meth:`pairs`. What is rare is learnt late: a reward model that
                shall see a slip needs more of them than one answer in seven.

        Returns:
            Rows ``{"prompt": …, "completions": […]}``, the best completion first.
        """
        rng, labels = self._rng("rankings", split, seed), self._rng("ranks", split, seed)
        rows: list[dict[str, str | list[str]]] = []
        for prompt in self.prompts(n, split, seed):
            answers: dict[str, None] = {}
            while len(answers) < num_completions:
                answers[_answer(prompt, writer, rng)] = None
            rows.append({"prompt": prompt, "completions": annotator.rank(prompt, list(answers), labels)})
        return rows


def _answer(prompt: str, writer: Callable[[Random], Style], rng: Random) -> str:
    return write(parse_prompt(prompt), writer(rng), rng)
