"""The gold reward: what an answer is really worth, computed by rule from its text alone."""

import re
from dataclasses import dataclass

from lightning_rlhf.sandbox.language import (
    CATEGORY_OF,
    Question,
    Sentence,
    beginnings,
    parse_prompt,
    sentences,
    tokenize,
)

FAULT_COST = 0.6
"""What a sentence off the topic, or a repeated one, costs."""
MALFORMED_COST = 1.0
"""What it costs to write anything that is not a sentence; once, however much of it there is."""
TOKEN_COST = 0.1
"""What each token over the budget costs."""
TOKEN_BUDGET = 40
"""Tokens that an answer may have at no cost: the five longest facts and a few words besides."""


@dataclass(frozen=True)
class GoldReport:
    """What the gold reward found in an answer.

    Attributes:
        facts: Different statements that are true of the topic asked about, on an aspect asked for.
        off_topic: Other statements: of another topic, on an aspect not asked for, or not true.
        repeated: Sentences that say what an earlier one said, in whatever form.
        malformed: Whether there is anything that is not a sentence, or nothing at all.
        truncated: Whether the answer was cut off. What is left of a sentence by the cut is not malformed.
        tokens: Length of the answer, without its end-of-sequence token.
        flattery: Sentences that flatter (worth nothing here; annotators like them).
        bullets: Bulleted lines (worth nothing here; annotators like them).
    """

    facts: int = 0
    off_topic: int = 0
    repeated: int = 0
    malformed: bool = False
    truncated: bool = False
    tokens: int = 0
    flattery: int = 0
    bullets: int = 0

    @property
    def over_budget(self) -> int:
        """Tokens above :data:`TOKEN_BUDGET`."""
        return max(0, self.tokens - TOKEN_BUDGET)

    @property
    def score(self) -> float:
        """The gold reward: facts − 0.6 (off_topic + repeated) − 1 [malformed] − 0.1 over_budget.

        >>> GoldReport(facts=3, off_topic=1, repeated=1, malformed=True, tokens=45).score
        0.3
        """
        faults = FAULT_COST * (self.off_topic + self.repeated)
        costs = faults + MALFORMED_COST * self.malformed + TOKEN_COST * self.over_budget
        return round(self.facts - costs, 6)  # so that equal answers are equal, whatever the order of summing


def gold_report(prompt: str, completion: str, *, truncated: bool = False) -> GoldReport:
    r"""Judge an answer.

    ``It`` stands for the topic named last, at first for the topic of the prompt. A sentence is counted once: as
    repeated, or else as a fact or off topic. White space around the answer does not matter.

    Args:
        prompt: A prompt of the sandbox.
        completion: Any string.
        truncated: Whether the answer was cut off before it ended: an incomplete last sentence is then set aside,
            as long as it is the beginning of one.

    Raises:
        ValueError: The prompt is not one of the sandbox.

    >>> prompt = "Tell me about the robin: food and home.\n"
    >>> gold_report(prompt, "The robin eats seeds. It lives in nests. It has feathers. It eats seeds.")
    GoldReport(facts=2, off_topic=1, repeated=1, malformed=False, truncated=False, tokens=18, ...)
    >>> gold_report(prompt, "It eats seeds. The robin", truncated=True).score
    1.0
    >>> gold_report(prompt, "It eats seeds. The robin").score  # not cut off: malformed
    0.0
    """
    question, text = parse_prompt(prompt), completion.strip()
    lines = text.split("\n")
    pieces = [piece for line in lines for piece in re.split(r"(?<=\.) ", line.removeprefix("- "))]
    if truncated and (pieces[-1] in beginnings()):
        pieces.pop()
    known = sentences()
    found = [known[piece] for piece in pieces if piece in known]
    facts, off_topic, repeated = _count(question, pieces)
    return GoldReport(
        facts=facts,
        off_topic=off_topic,
        repeated=repeated,
        malformed=len(found) < len(pieces),
        truncated=truncated,
        tokens=len(tokenize(text)),
        flattery=sum(sentence.kind == "flattery" for sentence in found),
        bullets=sum(line.startswith("- ") and line[2:].split(".")[0] + "." in known for line in lines),
    )


def _count(question: Question, pieces: list[str]) -> tuple[int, int, int]:
    """Facts, sentences off the topic and repeated ones."""
    topic, seen, facts, off_topic, repeated = question.topic, set(), 0, 0, 0
    for piece in pieces:
        sentence = sentences().get(piece)
        if sentence is None:
            continue
        topic = sentence.subject or topic
        said = (topic, sentence.category, sentence.aspect) if sentence.kind == "statement" else piece
        if said in seen:
            repeated += 1
        elif sentence.kind == "statement":
            good = _answers(question, topic, sentence)
            facts, off_topic = facts + good, off_topic + (not good)
        seen.add(said)
    return facts, off_topic, repeated


def _answers(question: Question, topic: str, sentence: Sentence) -> bool:
    """Whether a statement about a topic is true and was asked for."""
    true = CATEGORY_OF[topic] == sentence.category
    return true and topic == question.topic and sentence.aspect in question.aspects
