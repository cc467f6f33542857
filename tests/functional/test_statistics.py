"""Statistics of pairs and annotators against values by hand and references in NumPy."""

import numpy as np
import pytest
import torch
from torchmetrics.functional import cohen_kappa as torchmetrics_kappa

from lightning_rlhf.functional import (
    agreement,
    calibration_error,
    cohen_kappa,
    length_correlation,
    longer_wins_accuracy,
    mean_and_std,
    reliability_curve,
    soft_overlong_penalty,
    wilson_interval,
)
from lightning_rlhf.functional.moments import merge_moments, moments, regression_of_moments

# --- Wilson's interval ---


# scipy.stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
@pytest.mark.parametrize(
    ("successes", "total", "confidence", "expected"),
    [
        (8, 10, 0.95, (0.4901624715366418, 0.9433178485456248)),
        (0, 10, 0.95, (0.0, 0.27753279986288926)),
        (10, 10, 0.95, (0.7224672001371109, 1.0)),
        (600, 1000, 0.99, (0.5595625726937702, 0.6391191943255484)),
    ],
)
def test_wilson_interval_against_scipy(successes, total, confidence, expected):
    lower, upper = wilson_interval(successes, total, confidence=confidence)
    assert (lower.item(), upper.item()) == pytest.approx(expected, abs=1e-12)
    assert lower.dtype == torch.float64


def test_wilson_interval_solves_its_equation():
    """Its ends are the shares p that lie z standard errors sqrt(p (1 - p) / n) from what was measured."""
    n, k, z = 50.0, 31.5, 1.959963984540054
    for p in wilson_interval(k, n):
        assert (abs(p - k / n) / (p * (1 - p) / n).sqrt()).item() == pytest.approx(z)


def test_wilson_interval_limits():
    lower, upper = wilson_interval(torch.tensor([0.0, 5.0]), torch.tensor([0.0, 5.0]))
    assert (lower[0], upper[0]) == (0.0, 1.0)  # nothing seen, nothing known
    assert 0 < lower[1] < upper[1] == 1.0
    wide, narrow = (wilson_interval(60, 100, confidence=c) for c in (0.99, 0.5))
    assert wide[0] < narrow[0] < 0.6 < narrow[1] < wide[1]


def test_wilson_interval_covers():
    """Of 2,000 samples of 40 pairs about 95% have intervals that hold the true share."""
    wins = torch.distributions.Binomial(40, torch.tensor(0.78)).sample((2000,))
    lower, upper = wilson_interval(wins, 40)
    assert ((lower <= 0.78) & (upper >= 0.78)).double().mean().item() == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_wilson_interval_refuses_a_confidence(confidence):
    with pytest.raises(ValueError, match=rf"confidence must lie in \(0, 1\), got {confidence}"):
        wilson_interval(1, 2, confidence=confidence)


@pytest.mark.parametrize("successes", [-1, 3, float("nan")])
def test_wilson_interval_refuses_a_count(successes):
    with pytest.raises(ValueError, match=f"successes must lie between 0 and total, got {successes} of 2"):
        wilson_interval(successes, 2)


# --- calibration ---


def reference_curve(margins, num_bins):
    """Guo et al. (2017), equations 1 to 3, on the predicted winner and its probability."""
    p = 1 / (1 + np.exp(-margins))
    confidence, right = np.maximum(p, 1 - p), np.where(p == 0.5, 0.5, p > 0.5)
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    counts, means, accuracies = np.zeros(num_bins), np.full(num_bins, np.nan), np.full(num_bins, np.nan)
    for b in range(num_bins):
        inside = (confidence >= edges[b]) & ((confidence < edges[b + 1]) | (b == num_bins - 1))
        counts[b] = inside.sum()
        if inside.any():
            means[b], accuracies[b] = confidence[inside].mean(), right[inside].mean()
    return counts, means, accuracies


@pytest.mark.parametrize("num_bins", [1, 7, 10])
def test_calibration_against_a_reference(num_bins):
    margins = torch.randn(500, dtype=torch.float64) * 1.5 + 0.5
    margins[:3] = 0.0
    counts, means, accuracies = reference_curve(margins.numpy(), num_bins)
    curve = reliability_curve(margins, num_bins=num_bins)
    np.testing.assert_array_equal(curve.counts, counts)
    np.testing.assert_allclose(curve.confidence, means, rtol=1e-12)
    np.testing.assert_allclose(curve.accuracy, accuracies, rtol=1e-12)
    expected = np.nansum(counts / 500 * np.abs(accuracies - means))
    assert calibration_error(margins, num_bins=num_bins).item() == pytest.approx(expected, rel=1e-12)


def test_calibration_error_by_hand():
    """Two bins: confidence 0.6 with accuracy 1/2, confidence 0.9 with accuracy 1."""
    margins = torch.logit(torch.tensor([0.6, 0.4, 0.9, 0.9]).double())
    assert calibration_error(margins, num_bins=2).item() == pytest.approx((2 * 0.1 + 2 * 0.1) / 4)
    # the sign of the margin matters: all labels the other way round
    assert calibration_error(-margins, num_bins=2).item() == pytest.approx((2 * 0.1 + 2 * 0.9) / 4)


def perfect(pairs, generator):
    """Margins of a model that knows each pair's probability, labels drawn from it."""
    scores = torch.randn(pairs, generator=generator, dtype=torch.float64)
    flipped = torch.rand(pairs, generator=generator, dtype=torch.float64) > torch.sigmoid(scores)
    return torch.where(flipped, -scores, scores)


def test_a_perfect_model_shows_only_the_noise_that_the_docs_name():
    generator = torch.Generator().manual_seed(1)
    few = torch.stack([calibration_error(perfect(500, generator)) for _ in range(100)]).mean()
    many = torch.stack([calibration_error(perfect(3000, generator)) for _ in range(100)]).mean()
    assert few.item() == pytest.approx(0.045, abs=0.005)
    assert many.item() == pytest.approx(0.019, abs=0.004)
    assert calibration_error(3 * perfect(3000, generator)).item() > 0.1  # too sure of itself


def test_certain_margins_fall_into_the_last_bin():
    curve = reliability_curve(torch.tensor([1000.0, -1000.0, 0.0]))
    assert curve.counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert curve.accuracy[-1] == 0.5
    assert curve.confidence[1].isnan()


@pytest.mark.parametrize("function", [calibration_error, reliability_curve])
def test_calibration_refuses(function):
    with pytest.raises(ValueError, match=r"margins is nan in row 1 \(1 of 3 values"):
        function(torch.tensor([0.0, float("nan"), 1.0]))
    with pytest.raises(ValueError, match="margins is inf in row 0"):
        function(torch.tensor([float("inf")]))
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        function(torch.zeros(2), num_bins=0)


# --- moments and length ---


def test_correlation_against_numpy():
    lengths = torch.randint(1, 500, (300,))
    rewards = 0.01 * lengths + torch.randn(300)
    expected = np.corrcoef(rewards.double(), lengths)[0, 1]
    assert 0.5 < expected < 0.95
    assert length_correlation(rewards, lengths).item() == pytest.approx(expected, rel=1e-10)
    assert length_correlation(-rewards, lengths).item() == pytest.approx(-expected, rel=1e-10)


@pytest.mark.parametrize("parts", [[300], [1, 0, 299], [100, 150, 50], [1] * 300])
def test_merged_moments_equal_those_of_the_whole(parts):
    """Far from 0, where sums of squares would have lost every digit of the spread."""
    x = torch.randn(300, dtype=torch.float64) + 1e9
    y = torch.randn(300, dtype=torch.float64) - x
    merged = torch.zeros(7, dtype=torch.float64)
    for a, b in zip(x.split(parts), y.split(parts), strict=True):
        merged = merge_moments(torch.stack([merged, moments(a, b)]))
    assert merged[0] == 300
    np.testing.assert_allclose(merged[3:].reshape(2, 2) / 299, np.cov(x, y), rtol=1e-6)
    at_once = merge_moments(
        torch.stack([moments(a, b) for a, b in zip(x.split(parts), y.split(parts), strict=True)])
    )
    torch.testing.assert_close(at_once, merged, rtol=1e-6, atol=0.0)


def test_mean_and_std_by_hand():
    mean, std = mean_and_std(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert mean.item() == 3.0
    assert std.item() == pytest.approx((14 / 3) ** 0.5)


def test_where_nothing_varies_there_is_no_correlation():
    assert length_correlation(torch.full((7,), 0.1), torch.arange(7)).isnan()
    assert length_correlation(torch.arange(7.0), torch.full((7,), 9)).isnan()
    assert length_correlation(torch.tensor([1.0]), torch.tensor([3])).isnan()
    assert length_correlation(torch.zeros(0), torch.zeros(0)).isnan()
    # but little variation is some
    assert length_correlation(1.0 + 1e-7 * torch.arange(3.0), torch.arange(3)).item() == pytest.approx(
        1, abs=0.01
    )


def test_without_values_there_is_no_mean_and_without_two_no_spread():
    assert all(value.isnan() for value in mean_and_std(torch.zeros(0)))
    mean, std = mean_and_std(torch.ones(1))
    assert mean == 1
    assert std.isnan()


def test_longer_wins():
    assert longer_wins_accuracy(torch.tensor([3, 1, 2]), torch.tensor([1, 3, 2])).tolist() == [1, 0, 0.5]


def test_moments_refuse():
    with pytest.raises(ValueError, match="rewards has shape .2,. and lengths .3,.: give both the same shape"):
        length_correlation(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="rewards is nan in row 1"):
        length_correlation(torch.tensor([0.0, float("nan")]), torch.arange(2))
    with pytest.raises(ValueError, match="values is -inf in row 0"):
        mean_and_std(torch.tensor([-float("inf")]))
    with pytest.raises(ValueError, match=r"chosen_lengths has shape \(2,\) and rejected_lengths \(2, 1\)"):
        longer_wins_accuracy(torch.zeros(2), torch.zeros(2, 1))


# --- agreement ---


def test_kappa_by_hand():
    """The table [[20, 5], [10, 15]]: (0.7 - 0.5) / (1 - 0.5)."""
    a = torch.tensor([0] * 25 + [1] * 25)
    b = torch.tensor([0] * 20 + [1] * 5 + [0] * 10 + [1] * 15)
    assert agreement(a, b).item() == pytest.approx(0.7)
    assert cohen_kappa(a, b).item() == pytest.approx(0.4)


def test_kappa_limits():
    a, b = torch.randint(0, 3, (2, 20_000))
    assert cohen_kappa(a, a).item() == 1.0
    assert cohen_kappa(a, b).abs().item() < 0.02  # independent
    assert agreement(a, b).item() == pytest.approx(1 / 3, abs=0.02)
    assert cohen_kappa(torch.tensor([0, 1]), torch.tensor([1, 0])).item() == -1.0
    assert cohen_kappa(torch.ones(3).long(), torch.ones(3).long()).isnan()
    assert cohen_kappa(a[:0], b[:0]).isnan()


def test_kappa_equals_torchmetrics():
    a = torch.randint(0, 4, (400,))
    b = torch.where(torch.rand(400) < 0.6, a, torch.randint(0, 4, (400,)))
    expected = torchmetrics_kappa(a, b, task="multiclass", num_classes=4).item()
    assert 0.4 < expected < 0.8
    assert cohen_kappa(a, b).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("function", [agreement, cohen_kappa])
def test_agreement_refuses(function):
    with pytest.raises(ValueError, match=r"labels_a has shape \(2,\) and labels_b \(2, 1\)"):
        function(torch.zeros(2).long(), torch.zeros(2, 1).long())
    with pytest.raises(ValueError, match=r"labels_b must be integers, .* got torch.float32"):
        function(torch.zeros(2).long(), torch.zeros(2))
    with pytest.raises(ValueError, match="labels_b is -1 in row 1, but classes go from 0"):
        function(torch.zeros(2).long(), torch.tensor([0, -1]))


# --- what shaping is made of ---


@pytest.mark.parametrize("buffer", [0, 1, 7, 20])
def test_the_overlong_penalty_is_trls(buffer):
    other_rewards = pytest.importorskip("trl.rewards.other_rewards")
    lengths = list(range(30))
    ids = [[0] * n for n in lengths]
    expected = other_rewards.get_soft_overlong_punishment(20, buffer)(completion_ids=ids)
    ours = soft_overlong_penalty(torch.tensor(lengths), max_length=20, buffer=buffer)
    assert ours.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_regression_of_moments():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator, dtype=torch.float64)
    y = 2.0 - 3.0 * x + torch.randn(50, generator=generator, dtype=torch.float64)
    intercept, slope = regression_of_moments(moments(y, x))
    design = torch.stack([torch.ones_like(x), x], dim=1)
    expected = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(torch.stack([intercept, slope]), expected)
    assert regression_of_moments(moments(y, torch.ones(50)))[1].isnan()
