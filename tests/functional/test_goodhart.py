"""The curve of over-optimisation, the gaps, rank correlations, the sequential test, and length-controlled wins."""

import math

import pytest
import scipy.stats
import torch

from lightning_rlhf import functional as RF
from lightning_rlhf.functional.student_t import student_t_cdf, student_t_quantile

DOUBLE = torch.float64
D = torch.linspace(0, 5, 24, dtype=DOUBLE)


def curve(d, alpha, beta, method):
    return d * (alpha - beta * d) if method == "best_of_n" else alpha * d - beta * torch.xlogy(d, d)


# --- Student's t ---


@pytest.mark.parametrize("degrees", [1, 2, 3, 8, 31])
def test_student_t_equals_scipy(degrees):
    for t in (-3.0, -0.2, 0.7, 12.0):
        assert student_t_cdf(t, degrees) == pytest.approx(scipy.stats.t.cdf(t, degrees), abs=1e-12)
    for p in (0.025, 0.5, 0.9, 0.975):
        expected = scipy.stats.t.ppf(p, degrees)
        assert student_t_quantile(p, degrees) == pytest.approx(expected, abs=1e-9)


# --- the fit ---


@pytest.mark.parametrize("method", ["rl", "best_of_n"])
def test_a_curve_without_noise_is_recovered(method):
    gold = 3.0 + curve(D, 1.5, 0.5, method)
    fit = RF.fit_overoptimization(D**2, gold, method=method)
    assert (fit.alpha, fit.beta, fit.start) == pytest.approx((1.5, 0.5, 3.0), abs=1e-9)
    peak = 1.5 if method == "best_of_n" else math.exp(2.0)
    assert fit.peak == pytest.approx(peak, rel=1e-8)
    assert fit.kl_left(1.0) == pytest.approx(peak**2 - 1, rel=1e-8)
    torch.testing.assert_close(fit.predict(D**2), gold)
    # The peak is the maximum of the fitted curve.
    near = torch.tensor([0.99, 1.0, 1.01], dtype=DOUBLE) * peak
    assert fit.predict(near**2).argmax() == 1
    fixed = RF.fit_overoptimization(D**2, gold, method=method, start=3.0)
    assert (fixed.alpha, fixed.beta, fixed.start) == pytest.approx((1.5, 0.5, 3.0), abs=1e-9)


def test_weights_follow_the_standard_errors():
    """A point that is known badly moves the fit little; here the exact solution of the others remains."""
    gold = curve(D, 2.0, 0.5, "rl")
    gold[7] += 100.0
    errors = torch.full_like(gold, 0.1)
    errors[7] = 1e6
    fit = RF.fit_overoptimization(D**2, gold, standard_errors=errors)
    assert (fit.alpha, fit.beta) == pytest.approx((2.0, 0.5), abs=1e-5)
    assert RF.fit_overoptimization(D**2, gold).alpha != pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("method", ["rl", "best_of_n"])
@pytest.mark.parametrize("known", [False, True], ids=["scatter", "standard errors"])
def test_intervals_cover_the_truth(method, known):
    """95% intervals over 1,000 simulated curves, noise of 0.3; d* by Fieller's theorem."""
    alpha, beta = 1.2, 0.5 if method == "rl" else 0.2
    truth = (alpha, beta, math.exp(alpha / beta - 1) if method == "rl" else alpha / 2 / beta)
    noise = 0.3 * torch.randn(1000, len(D), generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    errors = torch.full_like(D, 0.3) if known else None
    covered = torch.zeros(3)
    for row in noise:
        fit = RF.fit_overoptimization(
            D**2, curve(D, alpha, beta, method) + row, method=method, standard_errors=errors
        )
        intervals = (fit.alpha_interval, fit.beta_interval, fit.peak_interval)
        covered += torch.tensor([low <= t <= high for t, (low, high) in zip(truth, intervals, strict=True)])
    assert ((covered >= 930) & (covered <= 970)).all(), covered


def test_no_peak_is_said():
    rising = RF.fit_overoptimization(D**2, curve(D, 1.0, -0.3, "rl") + 0.01 * torch.randn(len(D)))
    assert rising.peak_kl == math.inf
    assert rising.peak_interval == (math.inf, math.inf)
    assert rising.kl_left(10.0) == math.inf
    assert rising.describe().startswith("no peak: β = -0.")
    # A straight line with noise: a peak is not excluded, nor is that there is none.
    unsure = RF.fit_overoptimization(D**2, D + 0.3 * torch.randn(len(D)), method="best_of_n")
    assert unsure.beta_interval[0] < 0 < unsure.beta_interval[1]
    assert unsure.peak_interval[1] == math.inf
    assert 1.0 < unsure.peak_interval[0] < math.inf
    falling = RF.fit_overoptimization(D**2, curve(D, -1.0, 0.5, "best_of_n"), method="best_of_n")
    assert falling.peak_kl == 0


def test_a_peak_beyond_the_data_is_called_that():
    fit = RF.fit_overoptimization(D**2, curve(D, 2.0, 0.1, "best_of_n"), method="best_of_n")
    assert "beyond the data, which end at 25" in fit.describe()


@pytest.mark.parametrize(
    ("kl", "gold", "settings", "message"),
    [
        ([0.0, 1, 2, 3], [0.0, 1, 2, 3], {"method": "ppo"}, "method must be rl or best_of_n, got 'ppo'"),
        ([0.0, -1, 2, 3], [0.0, 1, 2, 3], {}, "kl is -1 at its lowest"),
        ([0.0, 1, 2], [0.0, 1, 2], {}, "3 points are too few for this fit: give at least 4"),
        ([1.0, 1, 1, 1], [0.0, 1, 2, 3], {}, "kl takes too few different values"),
        ([0.0, 1, 2, 3], [0.0, math.nan, 2, 3], {}, "gold is nan in row 1"),
        ([0.0, 1, 2, 3], [0.0, 1, 2], {}, "kl has shape"),
        ([0.0, 1, 2, 3], [0.0, 1, 2, 3], {"confidence": 1.0}, "confidence must lie in"),
        ([0.0, 1, 2, 3], [0.0] * 4, {"standard_errors": torch.zeros(4)}, "standard_errors must be positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(kl, gold, settings, message):
    with pytest.raises(ValueError, match=message):
        RF.fit_overoptimization(torch.tensor(kl), torch.tensor(gold), **settings)


# --- gaps ---


def pair(count, rho, shift=0.0, seed=0, proxy_shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    proxy, noise = torch.randn(2, count, generator=generator, dtype=DOUBLE)
    return proxy + proxy_shift, rho * proxy + math.sqrt(1 - rho**2) * noise + shift


def test_selection_by_the_proxy_alone_opens_the_raw_gap_and_not_the_excess_gap():
    proxy, gold = pair(20_000, 0.6)
    best = proxy > 1.0
    found = RF.goodhart_gap(proxy[best], gold[best], proxy, gold)
    assert found.correlation.item() == pytest.approx(0.6, abs=0.02)
    assert found.gap.item() == pytest.approx(0.4 * found.proxy.item(), abs=0.06)
    assert found.gap_lower > 0.3
    assert found.excess_gap_lower < 0 < found.excess_gap_upper


def test_gaps_do_not_depend_on_units_and_sign_matters():
    proxy, gold = pair(300, 0.5, shift=-1.0, proxy_shift=2.0, seed=1)
    reference = pair(300, 0.5)
    one = RF.goodhart_gap(proxy, gold, *reference)
    other = RF.goodhart_gap(5 * proxy - 3, 0.1 * gold + 7, 5 * reference[0] - 3, 0.1 * reference[1] + 7)
    torch.testing.assert_close(torch.stack(one), torch.stack(other))
    assert one.excess_gap_lower > 1.0
    mirrored = RF.goodhart_gap(gold, proxy, *reversed(reference))
    assert mirrored.gap.item() == pytest.approx(-one.gap.item())


def test_bootstrap_intervals_cover_the_truth():
    """True gap 1.5 and true excess gap 1.0, from 150 and 150 samples."""
    hits = torch.zeros(2)
    for seed in range(300):
        reference = pair(150, 0.5, seed=2 * seed)
        found = RF.goodhart_gap(
            *pair(150, 0.5, shift=-0.5, proxy_shift=1.0, seed=2 * seed + 1), *reference, num_resamples=200
        )
        hits += torch.tensor(
            [
                found.gap_lower <= 1.5 <= found.gap_upper,
                found.excess_gap_lower <= 1.0 <= found.excess_gap_upper,
            ]
        )
    assert (hits / 300 >= 0.9).all(), hits
    assert (hits / 300 <= 0.99).all(), hits


def test_a_constant_reward_cannot_standardise():
    proxy, gold = pair(5, 0.5)
    with pytest.raises(ValueError, match=r"reference_gold is 2 for all 5 samples of the starting policy"):
        RF.goodhart_gap(proxy, gold, proxy, torch.full((5,), 2.0))
    with pytest.raises(ValueError, match="0 samples and 5 of the starting policy are too few"):
        RF.goodhart_gap(proxy[:0], gold[:0], proxy, gold)


# --- rank correlations ---


def test_rank_correlations_equal_scipy_with_ties():
    x, y = torch.randint(0, 6, (2, 40))
    y = x + y
    assert RF.spearman_correlation(x, y).item() == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert RF.kendall_correlation(x, y).item() == pytest.approx(scipy.stats.kendalltau(x, y).statistic)
    assert RF.spearman_correlation(x, -y).item() == pytest.approx(-RF.spearman_correlation(x, y).item())
    assert RF.spearman_correlation(x, torch.ones_like(x)).isnan()
    assert RF.kendall_correlation(x, torch.ones_like(x)).isnan()


# --- the sequential test ---

EVALUATIONS, PROMPTS = 32, 32


def simulated(seed, gold_curve, rho, proxy_curve=None):
    """A run: the proxy rises and saturates, samples correlate by ρ, and prompts differ in what they are worth."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(EVALUATIONS, dtype=DOUBLE)
    proxy_mean = 2 * (1 - torch.exp(-time / 10)) if proxy_curve is None else proxy_curve
    noise = torch.randn(3, EVALUATIONS, PROMPTS, generator=generator, dtype=DOUBLE)
    worth = torch.randn(PROMPTS, generator=generator, dtype=DOUBLE)
    proxy = proxy_mean[:, None] + noise[0] + worth
    gold = gold_curve(time, proxy_mean)[:, None] + rho * noise[0] + math.sqrt(1 - rho**2) * noise[1] + worth
    return gold, proxy


def first_alarm(gold, proxy, threshold):
    return next(
        (
            t
            for t in range(2, EVALUATIONS + 1)
            if RF.decline_test(gold[:t], proxy[:t], threshold=threshold).alarm
        ),
        None,
    )


@pytest.fixture(scope="module")
def threshold():
    return RF.decline_threshold(EVALUATIONS)


@pytest.mark.parametrize(
    ("rho", "num_runs"),
    [
        (0.0, 100),
        (0.6, 50),
        *(
            pytest.param(rho, runs, marks=pytest.mark.slow)
            for rho, runs in ((0.0, 1000), (0.3, 334), (1.0, 334))
        ),
        pytest.param(0.6, 334, marks=pytest.mark.slow),
    ],
)
def test_false_alarms_stay_below_the_stated_rate(threshold, rho, num_runs):
    """Runs without a decline: gold follows the proxy with ρ; ρ = 0 is constant gold, the worst case."""
    runs = [simulated(seed, lambda _, proxy: rho * proxy, rho) for seed in range(num_runs)]
    alarms = sum(first_alarm(*run, threshold) is not None for run in runs)
    assert alarms <= 0.05 * len(runs)
    if rho == 0:  # gold's part alone is at its 5%: the threshold is no higher than it has to be
        fell = sum(
            any(RF.decline_statistic(gold[:t])[0] > threshold for t in range(2, EVALUATIONS + 1))
            for gold, _ in runs
        )
        tolerance = 3 * (0.05 * 0.95 / len(runs)) ** 0.5
        assert fell / len(runs) == pytest.approx(0.05, abs=min(tolerance, 0.049))


def test_a_real_decline_is_found(threshold):
    """Gold rises by one standard deviation and then falls by it over 16 evaluations; ρ = 0.6."""

    def hump(time, _):
        return torch.where(time < 16, time / 16, 2 - time / 16)

    rising = 0.1 * torch.arange(EVALUATIONS, dtype=DOUBLE)
    found = [first_alarm(*simulated(seed, hump, 0.6, rising), threshold) for seed in range(60)]
    assert sum(t is not None for t in found) >= 57
    assert all(t is None or t > 16 for t in found)
    assert sorted(t or 99 for t in found)[30] <= 28  # half of them before 75% of the gain is lost


def test_a_collapse_of_both_is_no_alarm_of_this_test(threshold):
    gold, proxy = simulated(0, lambda time, _: -0.2 * time, 0.6, proxy_curve=-0.2 * torch.arange(EVALUATIONS))
    assert RF.decline_statistic(gold)[0] > threshold
    assert first_alarm(gold, proxy, threshold) is None


def test_prompts_of_different_worth_do_not_matter():
    gold, _ = simulated(3, lambda time, _: -0.05 * time, 0.6)
    one = RF.decline_statistic(gold)
    other = RF.decline_statistic(gold + 100 * torch.randn(PROMPTS, dtype=DOUBLE))
    assert other[1] == one[1]
    torch.testing.assert_close(other[0], one[0])


def first_alarm_unpaired(gold, proxy, threshold):
    return next(
        (
            t
            for t in range(1, len(gold))
            if RF.decline_test(gold[: t + 1], proxy[: t + 1], threshold=threshold).alarm
        ),
        None,
    )


def other_prompts(seed, curve, proxy_curve, sizes):
    """Evaluations of prompts of their own, gold around a curve, the proxy around a rising one."""
    generator = torch.Generator().manual_seed(seed)
    return (
        [
            level + torch.randn(n, generator=generator, dtype=DOUBLE)
            for level, n in zip(levels, sizes, strict=True)
        ]
        for levels in (curve, proxy_curve)
    )


def test_other_prompts_in_every_evaluation():
    """Constant gold gives few alarms, a decline one, whatever the sizes of the evaluations."""
    count, sizes = 12, [32, 64, 48] * 4
    limit, rising = RF.decline_threshold(count), 0.3 * torch.arange(count, dtype=DOUBLE)
    quiet = [
        first_alarm_unpaired(*map(list, other_prompts(seed, torch.zeros(count), rising, sizes)), limit)
        for seed in range(200)
    ]
    assert sum(t is not None for t in quiet) <= 0.05 * 200
    time = torch.arange(count, dtype=DOUBLE)
    curve = torch.where(time < 6, time / 6, 2 - time / 6)
    found = [
        first_alarm_unpaired(*map(list, other_prompts(seed, curve, rising, sizes)), limit)
        for seed in range(30)
    ]
    assert all(t is None or t > 6 for t in found)
    assert sum(t is not None for t in found) >= 27


def test_unpaired_is_welch():
    """Two evaluations: scipy's unequal-variances t test, as a normal deviate."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(40, generator=generator, dtype=DOUBLE)
    other = 3 * torch.randn(25, generator=generator, dtype=DOUBLE) - 1
    z, blocks = RF.decline_statistic_unpaired([one, other])
    p = scipy.stats.ttest_ind(one.numpy(), other.numpy(), equal_var=False, alternative="greater").pvalue
    assert blocks == (1, 1)
    assert z.item() == pytest.approx(scipy.stats.norm.isf(p), abs=0.01)
    with pytest.raises(ValueError, match=r"an evaluation has shape \(1,\)"):
        RF.decline_statistic_unpaired([one, other[:1]])
    with pytest.raises(ValueError, match="gold has 2 evaluations and proxy 1: give both of each evaluation"):
        RF.decline_test([one, other], [one], threshold=3.0)


# --- length-controlled win rate ---


def test_length_controlled_win_rate():
    generator = torch.Generator().manual_seed(0)
    difference = 40 + 40 * torch.randn(20_000, generator=generator)
    logits = 0.4 + 1.5 * torch.tanh(difference / difference.std(correction=0))
    wins = (torch.rand(20_000, generator=generator) < torch.sigmoid(logits)).float()
    base = torch.full((20_000,), 200.0)
    found = RF.length_controlled_win_rate(wins, base + difference, base).item()
    assert found == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.02)
    assert wins.mean() > found + 0.1
    assert RF.length_controlled_win_rate(wins, base, base).item() == pytest.approx(
        wins.mean().item(), abs=1e-6
    )
    swapped = RF.length_controlled_win_rate(1 - wins, base, base + difference).item()
    assert swapped == pytest.approx(1 - found, abs=1e-9)
    assert 0.9 < RF.length_controlled_win_rate(torch.ones(9), base[:9], base[9:18]).item() < 1
    with pytest.raises(ValueError, match="wins must be at least one number"):
        RF.length_controlled_win_rate(wins + 1, base, base)


# --- the difference of two shares ---


def test_newcombe_covers_the_difference():
    generator = torch.Generator().manual_seed(0)
    one = (torch.rand(2000, 60, generator=generator) < 0.3).sum(1)
    two = (torch.rand(2000, 80, generator=generator) < 0.1).sum(1)
    lower, upper = RF.newcombe_interval(one, 60, two, 80)
    covered = ((lower <= 0.2) & (upper >= 0.2)).double().mean().item()
    assert 0.93 <= covered <= 0.975
    mirrored = RF.newcombe_interval(two, 80, one, 60)
    torch.testing.assert_close(mirrored[0], -upper)
    assert RF.newcombe_interval(0, 0, 1, 2)[0].isnan()
