"""The gold reward, by hand: one case a rule."""

import random

import pytest

from lightning_rlhf.sandbox import GoldReport, World, gold_report
from lightning_rlhf.sandbox.language import Question, parse_prompt, sentences, tokenize, vocabulary

PROMPT = "Tell me about the robin: food, home and night.\n"
THREE = "The robin eats seeds. It lives in nests. It sleeps on branches."

CASES = {
    "one fact": ("The robin eats seeds.", 1.0),
    "it is the topic of the prompt": ("It eats seeds.", 1.0),
    "three facts": (THREE, 3.0),
    "order and layout do not matter": (
        "- It lives in nests.\n- It sleeps on branches.\nIt eats seeds.",
        3.0,
    ),
    "white space around": (f"\n {THREE}\n", 3.0),
    "nothing stated": ("Let me think. What a great question.", 0.0),
    "true, but not asked for": ("It has feathers.", -0.6),
    "asked for, but not true": ("It eats worms.", -0.6),
    "true of another topic": ("The finch eats seeds.", -0.6),
    "true of another category": ("The oak drinks rain.", -0.6),
    "it follows the topic named last": ("The finch eats seeds. It lives in nests.", -1.2),
    "back on the topic": ("The finch eats seeds. The robin eats seeds. It lives in nests.", 1.4),
    "a fact again": ("It eats seeds. It eats seeds.", 0.4),
    "a fact again in other words": ("It eats seeds.\n- The robin eats seeds.", 0.4),
    "off the topic again costs the same": ("It has feathers. It has feathers.", -1.2),
    "flattery again": ("You ask so well. You ask so well.", -0.6),
    "filler again": ("There is more. So it goes. There is more.", -0.6),
    "empty": ("", -1.0),
    "white space only": (" \n ", -1.0),
    "gibberish": ("seeds the robin - : robin robin", -1.0),
    "malformed once, however much": ("It eats. Robin. nests it.", -1.0),
    "malformed beside a fact": ("It eats seeds. It eats.", 0.0),
    "cut off, but not said so": ("It eats seeds. The robin", 0.0),
    "two spaces": ("It eats seeds.  It lives in nests.", 0.0),
    "no space": ("It eats seeds.It lives in nests.", -1.0),
    "an empty line": ("It eats seeds.\n\nIt lives in nests.", 1.0),
    "a bullet inside a line": ("It eats seeds. - It lives in nests.", 0.0),
    "a lower-case sentence": ("it eats seeds.", -1.0),
    "other characters": ("Ünïcødé 🙂 \x00", -1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_score_by_hand(name):
    completion, score = CASES[name]
    assert gold_report(PROMPT, completion).score == pytest.approx(score)


def test_two_spaces_leave_the_first_fact():
    report = gold_report(PROMPT, "It eats seeds.  It lives in nests.")
    assert (report.facts, report.malformed) == (1, True)


def test_every_part_of_the_report():
    text = "What a great question.\n- The robin eats seeds.\n- It has wings.\nIt eats seeds. Robin. So it"
    assert gold_report(PROMPT, text, truncated=True) == GoldReport(
        facts=1, off_topic=1, repeated=1, malformed=True, truncated=True, tokens=27, flattery=1, bullets=2
    )


def test_tokens_over_the_budget():
    long = " ".join([*THREE.split(" ")] * 3)  # 3 × 15 tokens
    report = gold_report(PROMPT, long)
    assert (report.facts, report.repeated, report.tokens, report.over_budget) == (3, 6, 45, 5)
    assert report.score == pytest.approx(3 - 6 * 0.6 - 5 * 0.1)


@pytest.mark.parametrize("tail", ["", " The", " The robin lives", " It eats seeds", "\n", "\n-", "\n- It"])
def test_cut_off_is_not_malformed(tail):
    report = gold_report(PROMPT, "It eats seeds." + tail, truncated=True)
    assert (report.facts, report.malformed, report.truncated, report.score) == (1, False, True, 1.0)


@pytest.mark.parametrize("tail", [" Robin", " The eats", " seeds", " It li"])
def test_cut_off_gibberish_is_malformed(tail):
    assert gold_report(PROMPT, "It eats seeds." + tail, truncated=True).malformed


def test_cut_off_in_the_middle_does_not_excuse_the_beginning():
    assert gold_report(PROMPT, "The robin. It eats seeds", truncated=True).malformed


def test_any_string_is_judged():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices([*vocabulary(), " ", "\t", "…", "<unk>"], k=rng.randrange(70)))
        report = gold_report(PROMPT, text, truncated=rng.random() < 0.5)
        assert -40 < report.score <= 3
        assert report.bullets <= report.facts + report.off_topic + report.repeated + 8


def test_a_bullet_without_a_sentence_is_none():
    assert gold_report(PROMPT, "- \n- \n- robin.\n- It eats seeds.").bullets == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Tell me about the robin.",
        "Tell me about the robin: food.\n",
        "Tell me about the cat: food and home.\n",
        "Tell me about the robin: food and age.\n",
        "Tell me about the robin: food and food.\n",
        PROMPT + "It eats",
    ],
)
def test_foreign_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="not a prompt of the sandbox"):
        gold_report(prompt, "It eats seeds.")


def test_prompt_round_trip():
    question = Question("elm", ("night", "food", "danger"))
    assert parse_prompt(str(question)) == question
    assert parse_prompt(str(question).strip()) == question


def test_world_judges_by_the_same_rule():
    report = World(seed=3).report(PROMPT, THREE, truncated=True)
    assert report == gold_report(PROMPT, THREE, truncated=True)
    assert World(seed=3).gold(PROMPT, THREE) == 3.0


def test_a_predicate_names_one_fact():
    statements = [text for text, sentence in sentences().items() if sentence.kind == "statement"]
    assert len(statements) == 17 * 32
    assert max(len(tokenize(text)) for text in sentences()) == 6


def test_size_of_the_language():
    words = {token.strip().lower() for token in vocabulary() if token.strip().isalpha()}
    assert len(words) == 112
