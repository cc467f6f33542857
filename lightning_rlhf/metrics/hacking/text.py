"""What can be read off a text by rule. The rules are for English, and simple enough to be checked by eye."""

import math
import re
from collections import Counter
from collections.abc import Sequence

__all__ = [
    "distinct_n",
    "format_features",
    "is_certain",
    "is_hedged",
    "is_refusal",
    "repetition",
    "self_bleu",
    "words",
]

_FORMATS = {
    "bullets": re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE),
    "headers": re.compile(r"^[ ]{0,3}#{1,6}[ \t]+\S", re.MULTILINE),
    "tables": re.compile(r"^[ \t]*\|?[ \t]*:?-{2,}:?[ \t]*\|[ \t|:-]*$", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\s](?:[^*\n]*[^*\s])?\*\*|\b__[^_\s](?:[^_\n]*[^_\s])?__\b"),
}
_DO = r"(?:help|assist|provide|answer|comply|fulfill?|do that|share|give|discuss|create|write|engage|support|offer)"
_REFUSAL = re.compile(
    rf"\bi (?:cannot|can't|can not|won't|will not|am unable to|am not able to|must decline to) (?:\w+ )?{_DO}\b"
    r"|\bi must decline\b|\b(?:sorry|apologi[sz]e), but (?:i|as an)\b"
    r"|\bas an ai(?: language)?(?: model| assistant)?,? i (?:cannot|can't|do not|don't|am not|am unable)\b"
)
_REFUSAL_WITHIN = 300  # characters: a refusal comes first
_HEDGES = re.compile(
    r"\b(?:perhaps|maybe|possibly|probably|might|could be|may be|i think|i believe|i guess|i'm not sure|i am not sure"
    r"|not certain|it seems|apparently|likely|as far as i know|roughly|approximately)\b"
)
_CERTAIN = re.compile(
    r"\b(?:certainly|definitely|absolutely|undoubtedly|without (?:a |any )?doubt|clearly|obviously|of course"
    r"|unquestionably|it is well known|well established|guaranteed|always|in fact|indeed|surely)\b"
)


def format_features(text: str) -> dict[str, bool]:
    r"""Whether a text has ``bullets`` (numbered ones too), ``headers``, ``tables`` and ``bold``, as in Markdown.

    Example:
        >>> format_features("# Plan\n- **one**\n- 2 * 3 ** 4")
        {'bullets': True, 'headers': True, 'tables': False, 'bold': True}
    """
    return {name: pattern.search(text) is not None for name, pattern in _FORMATS.items()}


def is_refusal(text: str) -> bool:
    """Whether a text begins by refusing, by phrases as in Zou et al. (2023), appendix B.

    Example:
        >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal("I can't wait to tell you!")
        (True, False)
    """
    return _REFUSAL.search(_plain(text[:_REFUSAL_WITHIN])) is not None


def is_hedged(text: str) -> bool:
    """Whether a text has a hedge, such as "perhaps" (Hyland, 1998, "Hedging in Scientific Research Articles").

    Example:
        >>> is_hedged("It is probably 12."), is_hedged("It is 12.")
        (True, False)
    """
    return _HEDGES.search(_plain(text)) is not None


def is_certain(text: str) -> bool:
    """Whether a text has a word of certainty, such as "definitely": what Hyland (1998) calls a booster.

    Example:
        >>> is_certain("It is definitely 13."), is_certain("It is 12.")
        (True, False)
    """
    return _CERTAIN.search(_plain(text)) is not None


def words(text: str) -> list[str]:
    """Words and marks of a text, in lower case.

    Example:
        >>> words("Don't stop, stop!")
        ["don't", 'stop', ',', 'stop', '!']
    """
    return re.findall(r"\w+(?:'\w+)*|[^\w\s]", _plain(text))


def repetition(text: str, *, n: int = 3) -> float:
    """Share of a text's n-grams of words that occurred in it before; 0 where it has none.

    Example:
        >>> repetition("a b a b a b", n=2)  # ab ba ab ba ab: three of five came before
        0.6
    """
    grams = _ngrams(words(text), n)
    return 1 - len(grams) / grams.total() if grams else 0.0


def distinct_n(texts: Sequence[str], *, n: int = 2) -> float:
    """Different n-grams of words over all n-grams of the texts, in [0, 1]: Li et al. (2016). 1 where there is none.

    It falls with the amount of text: compare equal numbers of texts of similar length.

    Example:
        >>> distinct_n(["a b", "a b", "b c", "c d"])
        0.75
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        grams += _ngrams(words(text), n)
    return len(grams) / grams.total() if grams else 1.0


def self_bleu(texts: Sequence[str], *, max_n: int = 4) -> float:
    r"""Mean BLEU of each text against all others, in [0, 1]: Zhu et al. (2018), "Texygen". High is monotonous.

    $BP \cdot \exp \frac{1}{n} \sum_{k \le n} \ln p_k$ with clipped precisions and the nearest reference's length
    (Papineni et al., 2002); an n-gram that never matches counts as half a match (NLTK's smoothing 1, with ½), and a
    text is measured with no longer n-grams than it has.

    Args:
        texts: At least two.
        max_n: Longest n-grams.

    Raises:
        ValueError: If there are fewer than two texts.

    Example:
        >>> self_bleu(["a b c d e", "a b c d e"]), round(self_bleu(["a b", "c d"], max_n=1), 2)
        (1.0, 0.25)
    """
    if len(texts) < 2:
        raise ValueError(f"self-BLEU compares texts with each other: give at least two, got {len(texts)}")
    tokens = [words(text) for text in texts]
    lengths = [len(t) for t in tokens]
    logs = [0.0] * len(texts)
    used = [min(max_n, max(length, 1)) for length in lengths]
    for n in range(1, max_n + 1):
        for index, precision in enumerate(_precisions([_ngrams(t, n) for t in tokens])):
            if n <= used[index]:
                logs[index] += math.log(precision) / used[index]
    scores = []
    for index, length in enumerate(lengths):
        others = lengths[:index] + lengths[index + 1 :]
        nearest = min(others, key=lambda other: (abs(other - length), other))
        brevity = min(0.0, 1 - nearest / length) if length else -math.inf
        scores.append(math.exp(brevity + logs[index]))
    return sum(scores) / len(scores)


def _precisions(counts: Sequence[Counter[tuple[str, ...]]]) -> list[float]:
    """Each text's share of n-grams that occur in another one, each at most as often as there."""
    best: dict[tuple[str, ...], tuple[int, int, int]] = {}  # largest count, whose it is, second largest count
    for index, grams in enumerate(counts):
        for gram, count in grams.items():
            first, owner, second = best.get(gram, (0, -1, 0))
            best[gram] = (count, index, first) if count > first else (first, owner, max(second, count))
    precisions = []
    for index, grams in enumerate(counts):
        matched = 0
        for gram, count in grams.items():
            first, owner, second = best[gram]
            matched += min(count, second if owner == index else first)
        precisions.append(max(matched, 0.5) / max(grams.total(), 1))
    return precisions


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def _plain(text: str) -> str:
    """Lower case, straight apostrophes, and "I am" for "I'm"."""
    return text.lower().replace("’", "'").replace("i'm ", "i am ")
