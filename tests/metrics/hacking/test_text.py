import math

import pytest

from lightning_rlhf.metrics import hacking


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- one\n- two", {"bullets"}),
        ("Steps:\n  2) do it", {"bullets"}),
        ("It was -3 degrees, 5. That is cold.", set()),
        ("### Title\ntext", {"headers"}),
        ("#hashtag and C# code", set()),
        ("| a | b |\n| --- | --- |\n| 1 | 2 |", {"tables"}),
        ("a | b, and p(x | y)", set()),
        ("This is **bold**.", {"bold"}),
        ("2 ** 3 ** 4 is not, nor is my__init__py", set()),
        ("", set()),
    ],
)
def test_format_features(text, expected):
    assert {name for name, found in hacking.format_features(text).items() if found} == expected


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I’m sorry, but I can’t assist with that request.", True),
        ("As an AI language model, I do not have opinions.", True),
        ("I am unable to provide medical advice.", True),
        ("I must decline.", True),
        ("I'm sorry to hear that! You could call the shop.", False),
        ("I can't wait to tell you about it.", False),
        ("You cannot help it.", False),
        ("Boil it. " * 60 + "I cannot help you.", False),
    ],
)
def test_is_refusal(text, refuses):
    assert hacking.is_refusal(text) is refuses


def test_hedges_and_certainty_need_whole_words():
    assert not hacking.is_hedged("The mighty maybes of Thinkshire")
    assert hacking.is_hedged("I think so")
    assert not hacking.is_certain("He indeedly sidewalks")
    assert hacking.is_certain("That is well established.")


def test_diversity_by_hand():
    assert hacking.distinct_n(["a a a a"], n=1) == 0.25
    assert hacking.distinct_n([""]) == 1.0
    assert hacking.repetition("a b c a b c") == 0.25  # abc bca cab abc
    # "a b c" against "a b d": p1 = 2/3, p2 = 1/2, p3 smoothed to ½ of 1; the same for the other.
    expected = math.exp((math.log(2 / 3) + math.log(1 / 2) + math.log(1 / 2)) / 3)
    assert hacking.self_bleu(["a b c", "a b d"]) == pytest.approx(expected)
    # A word is matched no more often than another text has it, and a short text pays for its brevity.
    assert hacking.self_bleu(["a a", "a"], max_n=1) == pytest.approx((0.5 + math.exp(1 - 2)) / 2)


def test_self_bleu_equals_brute_force():
    """The counts of all others at once, against every text compared with its references one by one."""
    from collections import Counter

    texts = ["a b a c d", "a a b c", "d c b a a a b", "b b a c d e"]
    scores = []
    for i, text in enumerate(texts):
        tokens, others = text.split(), [t.split() for j, t in enumerate(texts) if j != i]
        log = 0.0
        for n in (1, 2):
            grams = lambda t: Counter(tuple(t[k : k + n]) for k in range(len(t) - n + 1))  # noqa: B023, E731
            matched = sum(min(c, max(grams(o)[g] for o in others)) for g, c in grams(tokens).items())
            log += math.log(max(matched, 0.5) / (len(tokens) - n + 1)) / 2
        nearest = min((abs(len(o) - len(tokens)), len(o)) for o in others)[1]
        scores.append(math.exp(min(0, 1 - nearest / len(tokens)) + log))
    assert hacking.self_bleu(texts, max_n=2) == pytest.approx(sum(scores) / 4)


def test_questions_and_their_pairs():
    questions = [*hacking.arithmetic_questions(50), *hacking.FACTS]
    assert hacking.arithmetic_questions(50) == questions[:50] != hacking.arithmetic_questions(50, seed=1)
    for question, prompts, answers in zip(
        questions, hacking.opinion_prompts(questions), hacking.nonsense_answers(questions), strict=True
    ):
        assert prompts.opinion.endswith(prompts.plain)
        assert question.wrong in prompts.opinion
        assert question.answer not in prompts.plain.split()
        assert hacking.answered(answers.plain_right, question)
        assert not hacking.answered(answers.plain_wrong, question)
        assert not hacking.answered(answers.fluent_wrong, question)
        assert hacking.is_certain(answers.fluent_wrong)
        assert not hacking.is_certain(answers.plain_right)
