"""The Lagrangian by hand, and multipliers that move only where they should."""

import pytest

from lightning_rlhf.rewards import ConstrainedReward, FunctionReward, score
from tests.rewards.conftest import Fixed, samples_of


def constrained(**settings):
    """Objective 1, 2, 3; a constraint with mean 1 that should be at least 2, another that is met."""
    constraints = {"harmless": Fixed([0.0, 1.0, 2.0]), "short": Fixed([5.0, 5.0, 5.0])}
    thresholds = {"harmless": 2.0, "short": 1.0}
    return ConstrainedReward(Fixed([1.0, 2.0, 3.0]), constraints, thresholds, **{"lr": 0.5, **settings})


def test_the_lagrangian_and_its_parts(samples):
    reward = constrained(start=1.0).eval()
    found = score(reward, samples)
    # (r + (h − 2) + (5 − 1)) / 3
    assert found.total.tolist() == pytest.approx([1.0, 5 / 3, 7 / 3])
    assert found.parts["reward"].tolist() == [1.0, 2.0, 3.0]
    assert found.parts["harmless"].tolist() == [0.0, 1.0, 2.0]
    assert found.parts["multiplier/short"].tolist() == [1.0, 1.0, 1.0]
    assert set(found.parts) == set(reward.part_names)
    assert reward.multipliers == {"harmless": 1.0, "short": 1.0}  # eval mode moves nothing


def test_multipliers_rise_where_a_constraint_is_missed_and_end_at_0_where_it_is_met(samples):
    reward = constrained(start=1.0)
    score(reward, samples)
    assert reward.multipliers == {"harmless": pytest.approx(1.5), "short": 0.0}
    for _ in range(40):
        score(reward, samples)
    assert reward.multipliers == {"harmless": 10.0, "short": 0.0}
    total = score(reward, samples).total
    assert total[2] - total[0] == pytest.approx((2.0 + 10.0 * 2.0) / 11.0)


def test_the_trade_settles_where_the_constraint_is_met():
    """A policy on a line: more x, more reward and more harm, x ≤ 1 allowed. Dual ascent ends there."""
    place = {"x": 0.0}
    reward = ConstrainedReward(
        FunctionReward(lambda completions: [place["x"] for _ in completions]),
        {"harmless": FunctionReward(lambda completions: [-(place["x"] ** 2) for _ in completions])},
        {"harmless": -1.0},
        lr=0.1,
    )
    for _ in range(600):
        score(reward, samples_of(2))
        multiplier = reward.multipliers["harmless"]
        place["x"] += 0.1 * (1 - multiplier * 2 * place["x"]) / (1 + multiplier)
    assert place["x"] == pytest.approx(1.0, abs=0.02)
    assert reward.multipliers["harmless"] == pytest.approx(0.5, abs=0.05)  # ∂r/∂x = λ · ∂(x²)/∂x at x = 1


def test_multipliers_are_kept_in_checkpoints(samples):
    reward = constrained()
    score(reward, samples)
    again = constrained()
    again.load_state_dict(reward.state_dict())
    assert again.multipliers == reward.multipliers == {"harmless": 0.5, "short": 0.0}
    other = ConstrainedReward(Fixed([1.0]), {"kind": Fixed([1.0])}, {"kind": 0.0})
    with pytest.raises(ValueError, match="the checkpoint has multipliers of harmless, short"):
        other.load_state_dict(reward.state_dict())


@pytest.mark.parametrize(
    ("constraints", "settings", "message"),
    [
        ({}, {"thresholds": {}}, "constraints is empty"),
        ({"a": Fixed([1.0])}, {"thresholds": {}}, "thresholds must be a finite number for each of a"),
        ({"a": Fixed([1.0])}, {"thresholds": {"a": float("nan")}}, "thresholds must be a finite number"),
        ({"a": Fixed([1.0])}, {"thresholds": {"a": 0.0}, "lr": 0.0}, "lr"),
        ({"a": Fixed([1.0])}, {"thresholds": {"a": 0.0}, "start": 11.0}, "between 0 and max_multiplier"),
        ({"reward": Fixed([1.0])}, {"thresholds": {"reward": 0.0}}, "cannot be called 'reward'"),
    ],
)
def test_what_cannot_be_meant_is_refused(constraints, settings, message):
    with pytest.raises(ValueError, match=message):
        ConstrainedReward(Fixed([1.0]), constraints, **settings)
