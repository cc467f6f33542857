"""What is drawn: by seed, well-formed, held out, and of mixed quality."""

from dataclasses import replace
from statistics import mean, stdev

import pytest

from lightning_rlhf.sandbox import Annotator, World
from lightning_rlhf.sandbox.language import parse_prompt, tokenize
from lightning_rlhf.sandbox.writing import MAX_TOKENS, contestant


@pytest.fixture(scope="module")
def world():
    return World(seed=0)


@pytest.fixture(scope="module")
def annotator(world):
    return Annotator(world)


def _draws(world, annotator, seed):
    return (
        world.prompts(20, "val", seed),
        world.demonstrations(20, seed=seed),
        world.pairs(20, seed=seed),
        world.preferences(20, annotator, seed=seed),
        world.rankings(20, annotator, seed=seed),
    )


def test_the_same_seeds_draw_the_same(world, annotator):
    again = World(seed=0)
    assert _draws(world, annotator, 0) == _draws(again, Annotator(again), 0)


def test_other_seeds_draw_others(world, annotator):
    for a, b, c in zip(
        _draws(world, annotator, 0),
        _draws(world, annotator, 1),
        _draws(World(seed=1), annotator, 0),
        strict=True,
    ):
        assert a != b
        assert a != c


def test_known_draw(world):
    """On every machine and Python: a change here changes everybody's sandbox."""
    assert world.demonstrations(1) == [KNOWN]


def test_a_longer_draw_begins_with_the_shorter(world, annotator):
    for draw in (world.prompts, world.demonstrations, world.pairs):
        assert draw(50)[:10] == draw(10)
    for draw in (world.preferences, world.rankings):
        assert draw(50, annotator)[:10] == draw(10, annotator)


def _questions(prompts):
    return {(q.topic, frozenset(q.aspects)) for q in map(parse_prompt, prompts)}


def test_held_out_questions_are_held_out_in_every_order(world):
    train, val = _questions(world.prompts(2688)), _questions(world.prompts(672, "val"))
    assert (len(train), len(val)) == (2688, 672)
    assert not train & val
    assert not _questions(row["prompt"] for row in world.demonstrations(5000, seed=7)) & val


def test_more_prompts_than_questions(world):
    prompts = world.prompts(1500, "val")
    assert len(prompts) == 1500
    assert len(_questions(prompts)) == 672


def test_unknown_split(world):
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        world.prompts(1, "test")


def test_demonstrations_are_well_formed_and_imperfect(world):
    reports = [world.report(**row) for row in world.demonstrations(1500)]
    assert not any(report.malformed for report in reports)
    assert max(report.tokens for report in reports) < MAX_TOKENS
    best = mean(len(parse_prompt(prompt).aspects) for prompt in world.prompts(1500))
    assert 0.5 < mean(report.score for report in reports) < best - 1
    for fault in ("off_topic", "repeated", "flattery", "bullets", "over_budget"):
        assert any(getattr(report, fault) for report in reports)


def test_pairs_differ_and_are_of_broad_quality(world):
    pairs = world.pairs(1500)
    assert all(a != b for _, a, b in pairs)
    assert max(len(tokenize(text)) for pair in pairs for text in pair[1:]) < MAX_TOKENS
    malformed = mean(world.report(prompt, text).malformed for prompt, *both in pairs for text in both)
    assert 0.1 < malformed < 0.2
    scores = [world.gold(prompt, text) for prompt, *both in pairs for text in both]
    assert stdev(scores) > 1.2
    assert min(scores) < -1.5
    assert max(scores) == 5


def test_preferences_are_labelled_pairs(world, annotator):
    rows, pairs = world.preferences(300, annotator), world.pairs(300)
    for row, (prompt, a, b) in zip(rows, pairs, strict=True):
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert row["prompt"] == prompt
        assert {row["chosen"], row["rejected"]} == {a, b}
    firsts = mean(row["chosen"] == a for row, (_, a, _) in zip(rows, pairs, strict=True))
    assert 0.4 < firsts < 0.6  # the order of a pair says nothing


def test_rankings_by_another_writer(world, annotator):
    rows = world.rankings(100, annotator, 2, writer=lambda rng: replace(contestant(rng), slip=1.0))
    texts = [(row["prompt"], text) for row in rows for text in row["completions"]]
    assert mean(world.report(*text).malformed for text in texts) > 0.9  # some slips leave sentences


def test_rankings_are_of_different_answers_the_better_first(world, annotator):
    rows = world.rankings(200, annotator, num_completions=4)
    assert [row["prompt"] for row in rows] == world.prompts(200)
    assert all(len(row["completions"]) == len(set(row["completions"])) == 4 for row in rows)
    by_place = [
        mean(annotator.utility(r["prompt"], r["completions"][place]) for r in rows) for place in range(4)
    ]
    assert by_place == sorted(by_place, reverse=True)


KNOWN = {
    "prompt": "Tell me about the bee: young, winter, sound, danger and food.\n",
    "completion": "The bee starts as grubs. It hides under bark. The bee hums over flowers. The bee fears spiders. "
    "The bee starts as grubs.",
}
