"""The language of the sandbox: its words, its sentences and what they state.

A living thing (a *topic*) belongs to one of four categories and each category has one fact for each of eight
aspects. Facts belong to the category, not to the topic, since a tiny model learns 32 facts but not 128. All that
can be said well is a finite set of sentences, so whether a text is well-formed, and what it states, is a look-up:

- a **statement**: ``The robin eats seeds.`` or ``It eats seeds.``, for each topic and each fact, true of it or not;
- **flattery**: ``What a great question.``;
- **filler**: ``Here is my answer.``.

A completion puts sentences side by side, separated by a space, by a new line, or by a new line and a bullet.
"""

import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

TOPICS = {
    "bird": ("robin", "sparrow", "finch", "lark"),
    "fish": ("trout", "salmon", "carp", "perch"),
    "tree": ("oak", "birch", "maple", "elm"),
    "insect": ("bee", "wasp", "hornet", "midge"),
}
ASPECTS = ("food", "home", "body", "young", "sound", "winter", "night", "danger")
FACTS = {
    "bird": (
        *("eats seeds", "lives in nests", "has feathers", "hatches from eggs"),
        *("sings at dawn", "flies south", "sleeps on branches", "fears cats"),
    ),
    "fish": (
        *("eats worms", "lives in lakes", "has scales", "hatches from spawn"),
        *("makes bubbles", "swims below ice", "rests in weeds", "fears nets"),
    ),
    "tree": (
        *("drinks rain", "stands in forests", "has bark", "grows from seeds"),
        *("rustles in wind", "sheds leaves", "breathes slowly", "fears fire"),
    ),
    "insect": (
        *("drinks nectar", "lives in meadows", "has wings", "starts as grubs"),
        *("hums over flowers", "hides under bark", "rests on petals", "fears spiders"),
    ),
}
"""What is said of each category, one fact an aspect, in the order of :data:`ASPECTS`; no two are the same."""
FLATTERY = ("What a great question.", "You ask so well.", "That is very clever.", "I admire your mind.")
FILLER = ("Here is my answer.", "Let me think.", "There is more.", "So it goes.")

CATEGORY_OF = {topic: category for category, topics in TOPICS.items() for topic in topics}
TOKEN = r" ?[A-Za-z]+|[^A-Za-z]"
"""One token: a word with the space before it, or a single other character."""

_PROMPT = re.compile(r"Tell me about the (\w+): ((?:\w+, )*\w+ and \w+)\.")


@dataclass(frozen=True)
class Sentence:
    """What a well-formed sentence is.

    Attributes:
        kind: A statement, flattery or filler.
        subject: The topic it names; empty for ``It`` and where nothing is stated.
        category: The category of which it is true; empty where nothing is stated.
        aspect: The aspect it is about; empty where nothing is stated.
    """

    kind: Literal["statement", "flattery", "filler"]
    subject: str = ""
    category: str = ""
    aspect: str = ""


@dataclass(frozen=True)
class Question:
    """What a prompt asks for.

    Attributes:
        topic: The living thing it is about.
        aspects: What to tell about it: two or more different aspects, in the order of the text.
    """

    topic: str
    aspects: tuple[str, ...]

    def __str__(self) -> str:
        r"""The prompt. It ends its line, so that no token spans prompt and completion.

        >>> str(Question("robin", ("food", "home", "night")))
        'Tell me about the robin: food, home and night.\n'
        """
        return f"Tell me about the {self.topic}: {', '.join(self.aspects[:-1])} and {self.aspects[-1]}.\n"


def parse_prompt(prompt: str) -> Question:
    """Read a prompt; white space around it does not matter.

    Raises:
        ValueError: This is no prompt of the sandbox.

    >>> parse_prompt("Tell me about the oak: night and food.")
    Question(topic='oak', aspects=('night', 'food'))
    """
    found = _PROMPT.fullmatch(prompt.strip())
    if found:
        topic, aspects = found[1], tuple(re.split(", | and ", found[2]))
        if topic in CATEGORY_OF and set(aspects) <= set(ASPECTS) and len(set(aspects)) == len(aspects):
            return Question(topic, aspects)
    raise ValueError(
        f"not a prompt of the sandbox: {prompt!r}; one looks like {str(Question('robin', ('food', 'home')))!r}"
    )


def state(subject: str, category: str, aspect: str) -> str:
    """The statement that a fact of a category holds of a subject: a topic, or "" for ``It``.

    >>> state("robin", "bird", "food"), state("", "bird", "food")
    ('The robin eats seeds.', 'It eats seeds.')
    """
    fact = FACTS[category][ASPECTS.index(aspect)]
    return f"The {subject} {fact}." if subject else f"It {fact}."


@cache
def sentences() -> dict[str, Sentence]:
    """Every well-formed sentence.

    >>> sentences()["It lives in lakes."]
    Sentence(kind='statement', subject='', category='fish', aspect='home')
    >>> len(sentences())  # (16 topics and It) × 32 facts, 4 of flattery, 4 of filler
    552
    """
    found = {
        state(subject, category, aspect): Sentence("statement", subject, category, aspect)
        for subject, category, aspect in product(("", *CATEGORY_OF), FACTS, ASPECTS)
    }
    found |= {text: Sentence("flattery") for text in FLATTERY}
    return found | {text: Sentence("filler") for text in FILLER}


@cache
def beginnings() -> frozenset[str]:
    """What a sentence can be when it is cut off between two tokens, with the bare bullet of a list.

    >>> "It lives" in beginnings(), "It live" in beginnings(), "It lives in lakes." in beginnings()
    (True, False, False)
    """
    ends = ((text, found.start()) for text in sentences() for found in re.finditer(TOKEN, text))
    return frozenset({text[:end] for text, end in ends} | {"-"})


def tokenize(text: str) -> list[str]:
    r"""Cut a text into tokens, as the sandbox's tokenizer does.

    >>> tokenize("It eats seeds.\n- It")
    ['It', ' eats', ' seeds', '.', '\n', '-', ' It']
    """
    return re.findall(TOKEN, text)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token that a prompt or a completion can have, sorted."""
    prompts = (str(Question(topic, ASPECTS[i:] + ASPECTS[:i])) for topic in CATEGORY_OF for i in range(8))
    texts = (*prompts, *sentences(), *(f"- {text}\n" for text in sentences()))
    return tuple(sorted({token for text in texts for token in tokenize(text)}))
