"""Gold and annotators as rewards."""

import pytest

from lightning_rlhf.rewards import Samples, score
from lightning_rlhf.sandbox import AnnotatorReward, GoldReward, World


def samples_of(pairs):
    rows = [(prompt, text) for prompt, *texts in pairs for text in texts]
    return Samples(
        [p for p, _ in rows], [t for _, t in rows], [[5]] * len(rows), [[6]] * len(rows), [False] * len(rows)
    )


def test_gold_is_the_worlds():
    world = World(3)
    pairs = world.pairs(20)
    found = score(GoldReward(3), samples_of(pairs)).total.tolist()
    assert found == pytest.approx([world.gold(p, text) for p, *texts in pairs for text in texts])


def test_an_annotator_wins_as_often_as_bradley_terry_says():
    pairs = World(0).pairs(4)
    samples = samples_of(pairs)
    wins = [0] * len(pairs)
    reward = AnnotatorReward(0)
    for draw in range(400):
        reward.draw = draw
        values = score(reward, samples).total.view(-1, 2)
        wins = [won + int(a > b) for won, (a, b) in zip(wins, values.tolist(), strict=True)]
    for won, pair in zip(wins, pairs, strict=True):
        p = reward.annotator.probability(*pair)
        assert won / 400 == pytest.approx(p, abs=4 * (p * (1 - p) / 400) ** 0.5 + 1e-9)
    again = score(reward, samples).total
    assert again.tolist() == score(reward, samples).total.tolist()


def test_without_noise_it_is_the_utility():
    pairs = World(0).pairs(5)
    reward = AnnotatorReward(0, noisy=False)
    found = score(reward, samples_of(pairs)).total.tolist()
    annotator = reward.annotator
    expected = [annotator.utility(p, text) / annotator.temperature for p, *texts in pairs for text in texts]
    assert found == pytest.approx(expected, rel=1e-6)
