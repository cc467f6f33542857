"""Sums and shaping: values by hand, parts by name, statistics that survive a checkpoint and are those of all ranks."""

import json
import random

import pytest
import torch
from torch import nn

from lightning_rlhf.rewards import (
    Clip,
    LengthPenalty,
    LengthResidual,
    MissingEOSPenalty,
    Normalized,
    RewardError,
    ShapedReward,
    SoftOverlong,
    WeightedReward,
    score,
)
from tests.processes import fork
from tests.rewards.conftest import Fixed, samples_of
from tests.rewards.ddp_worker import batches, shapers, work


def shape(shaper, values):
    """A shaper's output for samples of lengths 1, 2, …, the last one cut off."""
    return score(ShapedReward(Fixed(values), [shaper]), samples_of(len(values))).total


def test_a_weighted_sum_and_its_parts(samples):
    rewards = {
        "good": Fixed([1.0, 2.0, 3.0]),
        "costly": Fixed([1.0, 0.0, 1.0]),
        "plain": Fixed([0.5, 0.5, 0.5]),
    }
    result = score(WeightedReward(rewards, {"good": 2.0, "costly": -3.0}), samples)
    assert result.total.tolist() == [-0.5, 4.5, 3.5]
    assert result.parts["costly"].tolist() == [1.0, 0.0, 1.0]
    assert list(result.parts) == ["good", "costly", "plain"]


def test_parts_of_parts_are_named_by_their_way(samples):
    inner = ShapedReward(Fixed([9.0, 0.0, 1.0], name="raw"), [Clip(-2.0, 2.0)])
    reward = WeightedReward({"a": inner, "b": Fixed([1.0, 1.0, 1.0])})
    result = score(ShapedReward(reward, [LengthPenalty(1.0)]), samples)
    assert list(result.parts) == ["a", "a/raw", "b", "shaped_reward"]
    assert result.parts["a"].tolist() == [2.0, 0.0, 1.0]
    assert result.parts["a/raw"].tolist() == [9.0, 0.0, 1.0]
    assert result.total.tolist() == [2.0, -1.0, -1.0]
    assert tuple(result.parts) == ShapedReward(reward, []).part_names


def test_a_sum_names_the_term_that_fails(samples):
    reward = WeightedReward({"fine": Fixed([1.0] * 3), "bad": Fixed([1.0, float("nan"), 1.0], name="judge")})
    with pytest.raises(RewardError, match=r"^the reward 'judge' is nan for sample 1"):
        score(reward, samples)


def test_sums_that_mean_nothing_are_refused():
    one = Fixed([1.0])
    with pytest.raises(ValueError, match="rewards is empty"):
        WeightedReward({})
    with pytest.raises(ValueError, match="weights names 'goood', and the rewards are good"):
        WeightedReward({"good": one}, {"goood": 1.0})
    with pytest.raises(ValueError, match="the weight of 'good' is nan"):
        WeightedReward({"good": one}, {"good": float("nan")})
    with pytest.raises(ValueError, match="several rewards would be logged as 'shaped_reward'"):
        ShapedReward(ShapedReward(one, []), [])


def test_shapers_by_hand():
    assert shape(Clip(-1.0, 2.0), [-5.0, 0.5, 9.0]).tolist() == [-1.0, 0.5, 2.0]
    assert shape(LengthPenalty(0.5), [1.0, 1.0, 1.0]).tolist() == [0.5, 0.0, -0.5]
    assert shape(MissingEOSPenalty(2.0), [1.0, 1.0, 1.0]).tolist() == [1.0, 1.0, -1.0]
    assert shape(MissingEOSPenalty(replacement=-4.0), [1.0, 1.0, 7.0]).tolist() == [1.0, 1.0, -4.0]
    assert shape(SoftOverlong(4, 2, coef=10.0), [0.0] * 5).tolist() == [0.0, 0.0, -5.0, -10.0, -10.0]


def test_shapers_are_applied_in_the_order_of_the_list():
    reward = Fixed([9.0, 9.0])
    clipped_first = ShapedReward(reward, [Clip(-1.0, 1.0), LengthPenalty(3.0)])
    penalised_first = ShapedReward(reward, [LengthPenalty(3.0), Clip(-1.0, 1.0)])
    assert score(clipped_first, samples_of(2)).total.tolist() == [-2.0, -5.0]
    assert score(penalised_first, samples_of(2)).total.tolist() == [1.0, 1.0]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="low must be less than high, got 1.0 and 1.0"):
        Clip(1.0, 1.0)
    with pytest.raises(ValueError, match="penalty is subtracted and must be at least 0, got -1"):
        MissingEOSPenalty(-1)
    with pytest.raises(ValueError, match=r"buffer must lie between 0 and max_length \(10\), got 11"):
        SoftOverlong(10, 11)


def test_normalised_by_everything_seen_so_far():
    shaper = Normalized()
    assert shape(shaper, [1.0, 3.0]).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    values = torch.tensor([1.0, 3.0, 8.0, 2.0, 5.0])
    again = shape(shaper, values[2:].tolist())
    torch.testing.assert_close(again, (values[2:] - values.mean()) / values.std())
    assert (shaper.mean, shaper.std) == pytest.approx((values.mean().item(), values.std().item()))
    only_scale = Normalized(center=False)
    torch.testing.assert_close(shape(only_scale, values.tolist()), values / values.std())


def test_statistics_do_not_cancel_and_values_without_spread_are_only_centred():
    shaper = Normalized()
    for _ in range(100):
        out = shape(shaper, [1e6, 1e6 + 1])
    assert shaper.std == pytest.approx((200 / 199 / 4) ** 0.5, rel=1e-9)
    assert out[1] - out[0] == pytest.approx(1 / shaper.std, rel=1e-6)
    assert shape(Normalized(), [0.1, 0.1, 0.1]).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert shape(Normalized(), [5.0]).tolist() == [0.0]


def test_a_validation_changes_no_statistics():
    shaper = Normalized()
    assert shape(shaper.eval(), [4.0, 6.0]).tolist() == [4.0, 6.0]  # nothing seen yet: as they are
    shape(shaper.train(), [1.0, 3.0])
    assert shape(shaper.eval(), [2.0, 9.0])[0] == 0.0
    assert shaper.mean == 2.0


def test_what_was_seen_survives_a_checkpoint_and_a_cast(tmp_path):
    draw = random.Random(0)
    first, second = ([draw.gauss(3.0, 2.0) for _ in range(40)] for _ in range(2))

    def fresh():
        module = nn.Module()
        shapers = [Normalized(), LengthResidual()]
        module.reward = WeightedReward({"a": ShapedReward(Fixed(first), shapers), "b": Fixed(second)})
        return module, shapers

    module, _ = fresh()
    score(module.reward, samples_of(40))
    torch.save(module.state_dict(), tmp_path / "state.ckpt")
    continued = score(module.reward, samples_of(40)).total
    other, (normalized, residual) = fresh()
    other.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True), strict=True)
    other.to(torch.bfloat16)
    assert score(other.reward, samples_of(40)).total.tolist() == continued.tolist()
    assert normalized.std != 1.0
    assert residual.slope is not None


def test_the_residual_is_what_length_does_not_explain():
    values = torch.tensor([1.0, 4.0, 3.0, 6.0])
    lengths = torch.arange(1.0, 5.0)
    shaper = LengthResidual()
    residuals = shape(shaper, values.tolist())
    assert (shaper.slope, shaper.intercept) == pytest.approx((1.4, 0.0))
    torch.testing.assert_close(residuals, values - 1.4 * lengths)
    assert residuals.sum().item() == pytest.approx(0.0, abs=1e-5)
    assert (residuals * lengths).sum().item() == pytest.approx(0.0, abs=1e-5)
    # Fitted once: later samples are measured by the same line.
    torch.testing.assert_close(shape(shaper, [10.0, 10.0]), torch.tensor([8.6, 7.2]))
    torch.testing.assert_close(shape(LengthResidual(0.5, 1.0), [2.0, 2.0]), torch.tensor([0.5, 0.0]))


def test_a_residual_that_cannot_be_fitted_says_so():
    with pytest.raises(
        RewardError, match="'shaped_reward' failed: ValueError: LengthResidual cannot be fitted on 1"
    ):
        shape(LengthResidual(), [1.0])
    with pytest.raises(RewardError, match="LengthResidual is not fitted yet"):
        shape(LengthResidual().eval(), [1.0, 2.0])


def test_two_ranks_equal_one(tmp_path):
    fork(work, tmp_path, world=2)
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    together = shapers()
    whole = [[shaper(*batch).tolist() for shaper in together] for batch in batches()]
    for ours, left, right in zip(whole, one["values"], two["values"], strict=True):
        for values, first, second in zip(ours, left, right, strict=True):
            assert first + second == pytest.approx(values, rel=1e-6, abs=1e-6)
    assert one["state"] == two["state"]
