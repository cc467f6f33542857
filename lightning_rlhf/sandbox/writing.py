"""Writers of answers: from good to bad, by the chances of a :class:`Style`."""

from dataclasses import dataclass
from random import Random

from lightning_rlhf.sandbox.language import (
    ASPECTS,
    CATEGORY_OF,
    FACTS,
    FILLER,
    FLATTERY,
    Question,
    state,
    tokenize,
)

MAX_TOKENS = 64
"""Tokens of a completion at most, its end-of-sequence token included."""


@dataclass(frozen=True)
class Style:
    """How somebody writes answers; each number is a probability.

    Attributes:
        coverage: That an aspect asked for is spoken of.
        drift: That a sentence off the topic follows a fact.
        repeat: That a sentence is said again at the end, once for every two sentences.
        flattery: That the answer flatters, at its start and again at its end.
        filler: The same for filler.
        bullets: That the facts are a bulleted list.
        slip: That a token is lost or doubled somewhere, so that a sentence is none.
    """

    coverage: float = 1.0
    drift: float = 0.0
    repeat: float = 0.0
    flattery: float = 0.0
    filler: float = 0.0
    bullets: float = 0.0
    slip: float = 0.0


def demonstrator(rng: Random) -> Style:
    """A writer of demonstrations: willing, but none too careful."""
    return Style(
        coverage=rng.uniform(0.4, 1.0),
        drift=rng.uniform(0.0, 0.5),
        repeat=rng.uniform(0.0, 0.3),
        flattery=rng.uniform(0.0, 0.5),
        filler=rng.uniform(0.0, 0.5),
        bullets=0.25,
    )


def contestant(rng: Random) -> Style:
    """A writer of answers to compare: from excellent to poor."""
    return Style(
        coverage=rng.uniform(0.2, 1.0),
        drift=rng.uniform(0.0, 0.8) ** 2 / 0.8,
        repeat=rng.uniform(0.0, 0.8) ** 2 / 0.8,
        flattery=rng.uniform(0.0, 0.7),
        filler=rng.uniform(0.0, 0.7),
        bullets=0.35,
        slip=0.15,
    )


def write(question: Question, style: Style, rng: Random) -> str:
    """Write an answer of at most :data:`MAX_TOKENS` tokens, well-formed unless the writer slips.

    >>> write(Question("oak", ("food", "body")), Style(), Random(1))
    'The oak drinks rain. It has bark.'
    """
    listed = rng.random() < style.bullets
    facts = _facts(question, style, rng)
    opening, closing = _asides(style, rng), _asides(style, rng)
    body = [*opening, *facts, *closing]
    body += [rng.choice(body) for _ in range(len(body) // 2) if rng.random() < style.repeat] if body else []
    text = ""
    for sentence in body or [rng.choice(FILLER)]:
        bullet = listed and sentence in facts
        longer = text + (("\n" if text else "") + "- " if bullet else " " if text else "") + sentence
        if len(tokenize(longer)) >= MAX_TOKENS:
            break
        text = longer
    return _slip(text, rng) if rng.random() < style.slip else text


def _slip(text: str, rng: Random) -> str:
    """Lose a token or, where there is room, write it twice."""
    tokens = tokenize(text)
    place = rng.randrange(len(tokens))
    times = 2 if rng.random() < 0.5 and len(tokens) < MAX_TOKENS - 1 else 0
    return "".join([*tokens[:place], *[tokens[place]] * times, *tokens[place + 1 :]]).strip()


def _facts(question: Question, style: Style, rng: Random) -> list[str]:
    """The statements of an answer: each asked aspect with its chance, and what drifts off the topic after it."""
    category = CATEGORY_OF[question.topic]
    spoken = []
    for aspect in question.aspects:
        spoken += [(question.topic, category, aspect)] if rng.random() < style.coverage else []
        spoken += [_drift(question, rng)] if rng.random() < style.drift else []
    named = ["", *(topic for topic, _, _ in spoken)]  # the topic named before each
    return [
        state("" if topic == before and rng.random() < 0.5 else topic, truth, aspect)
        for before, (topic, truth, aspect) in zip(named, spoken, strict=False)
    ]


def _drift(question: Question, rng: Random) -> tuple[str, str, str]:
    """Something off the topic: of another topic, on another aspect, or not true."""
    topic, category, aspect = question.topic, CATEGORY_OF[question.topic], rng.choice(ASPECTS)
    kind = rng.choice(("topic", "aspect", "truth"))
    if kind == "topic":
        topic = rng.choice([other for other in CATEGORY_OF if other != topic])
        category = CATEGORY_OF[topic]
    elif kind == "aspect":
        aspect = rng.choice([other for other in ASPECTS if other not in question.aspects])
    else:
        category = rng.choice([other for other in FACTS if other != category])
    return topic, category, aspect


def _asides(style: Style, rng: Random) -> list[str]:
    """Flattery and filler, each with its chance."""
    flattery = [rng.choice(FLATTERY)] if rng.random() < style.flattery else []
    return flattery + ([rng.choice(FILLER)] if rng.random() < style.filler else [])
