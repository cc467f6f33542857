"""Annotators: utility by hand, and agreement and best accuracy as computed, on fresh pairs and by simulation."""

import random
from statistics import mean

import pytest

from lightning_rlhf.sandbox import Annotator, World, best_accuracy, mean_agreement

PROMPT = "Tell me about the robin: food, home and night.\n"


@pytest.fixture(scope="module")
def world():
    return World(seed=0)


@pytest.fixture(scope="module")
def annotator(world):
    return Annotator(world)


@pytest.fixture(scope="module")
def probabilities(world, annotator):
    return [annotator.probability(*pair) for pair in world.pairs(3000, "val")]


def test_utility_is_gold_and_biases(annotator):
    text = "What a great question.\n- The robin eats seeds.\n- It has wings."  # 5 + 7 + 6 tokens
    assert annotator.utility(PROMPT, text) == pytest.approx((1 - 0.6) + 0.02 * 18 + 0.4 + 2 * 0.2)


def test_no_bias_is_gold(world):
    fair = Annotator(world, length_bias=0, flattery_bias=0, format_bias=0)
    for prompt, a, b in world.pairs(50):
        assert fair.utility(prompt, a) == world.gold(prompt, a)
        assert (fair.probability(prompt, a, b) > 0.5) == (world.gold(prompt, a) > world.gold(prompt, b))


def test_utility_of_a_cut_off_answer(annotator):
    cut = "It eats seeds. The robin"
    assert annotator.utility(PROMPT, cut, truncated=True) == pytest.approx(1 + 0.02 * 6)
    assert annotator.utility(PROMPT, cut) == pytest.approx(0 + 0.02 * 6)


def test_probability_is_bradley_terry(annotator):
    a, b = "The robin eats seeds.", "It has wings."
    odds = annotator.probability(PROMPT, a, b) / annotator.probability(PROMPT, b, a)
    margin = (1 + 0.02 * 5) - (-0.6 + 0.02 * 4)
    assert odds == pytest.approx(2.718281828459045 ** (margin / annotator.temperature))
    assert annotator.probability(PROMPT, a, a) == 0.5


def test_agreement_and_best_accuracy_on_fresh_pairs(annotator, probabilities):
    assert annotator.agreement == pytest.approx(0.78, abs=1e-6)
    assert mean_agreement(probabilities) == pytest.approx(0.78, abs=0.01)
    assert best_accuracy(probabilities) == pytest.approx(annotator.best_accuracy, abs=0.01)
    assert 0.78 < annotator.best_accuracy < 0.874  # the bounds for 78% agreement, design §7


def test_formulas_by_simulation(probabilities):
    rng = random.Random(0)
    agreed, right, rounds = [], [], 10
    for p in probabilities * rounds:
        one, other = rng.random() < p, rng.random() < p
        agreed.append(one == other)
        right.append(one == (p > 0.5))
    error = 0.5 / len(agreed) ** 0.5
    assert mean(agreed) == pytest.approx(mean_agreement(probabilities), abs=4 * error)
    assert mean(right) == pytest.approx(best_accuracy(probabilities), abs=4 * error)


def test_biases_move_choices_away_from_gold(world, annotator):
    text = "The robin eats seeds."
    flattering = "The robin eats seeds. You ask so well."
    assert world.gold(PROMPT, text) == world.gold(PROMPT, flattering)
    assert annotator.probability(PROMPT, flattering, text) > 0.6


def test_another_agreement(world, annotator):
    assert Annotator(world, agreement=0.9).temperature < annotator.temperature


@pytest.mark.parametrize("agreement", [0.5, 1.0, 78])
def test_impossible_agreement(world, agreement):
    with pytest.raises(ValueError, match="above 0.5 and below 1"):
        Annotator(world, agreement=agreement)


def test_agreement_that_ties_prevent(world):
    with pytest.raises(ValueError, match="too many pairs are ties"):
        Annotator(world, length_bias=0, flattery_bias=0, format_bias=0, agreement=0.9999)


def test_two_of_a_ranking_are_ordered_as_a_pair_is(world, annotator):
    prompt, a, b = world.pairs(3)[2]
    c = "What a great question."
    rng = random.Random(0)
    rankings = [annotator.rank(prompt, [a, c, b], rng) for _ in range(4000)]
    assert all(sorted(ranking) == sorted([a, b, c]) for ranking in rankings)
    for x, y in ((a, b), (b, c), (a, c)):
        expected = annotator.probability(prompt, x, y)
        assert mean(r.index(x) < r.index(y) for r in rankings) == pytest.approx(expected, abs=0.025)
