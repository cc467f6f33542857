import math

import pytest
import torch
from torch import nn

from lightning_rlhf import functional as RF
from lightning_rlhf.metrics import GoodhartGap
from tests.metrics.conftest import goodhart_rows, numbers


def filled(rows, cuts=1, **settings):
    metric = GoodhartGap(**settings)
    for step, *values in rows:
        for part in zip(*(value.chunk(cuts) for value in values), strict=True):
            metric.update(step, *part)
    return metric


def test_equals_its_functional_twins():
    rows = goodhart_rows()
    found = filled(rows).compute()
    (_, _, proxy0, gold0), (_, kl, proxy, gold) = rows[0], rows[-1]
    expected = RF.goodhart_gap(proxy, gold, proxy0, gold0)
    for name in ("proxy", "gold", "gap", "excess_gap", "correlation"):
        assert found[name].item() == pytest.approx(getattr(expected, name).item()), name
    for name in (
        "gap_lower",
        "gap_upper",
        "excess_gap_lower",
        "excess_gap_upper",
    ):  # other draws, same samples
        assert found[name].item() == pytest.approx(getattr(expected, name).item(), abs=0.1), name
    kls = torch.stack([row[1].mean() for row in rows])
    golds = (torch.stack([row[3].mean() for row in rows]) - gold0.mean()) / gold0.std()
    proxies = torch.stack([row[2].mean() for row in rows])
    fit = RF.fit_overoptimization(kls, golds)
    assert (found["alpha"].item(), found["beta"].item()) == pytest.approx((fit.alpha, fit.beta))
    assert found["peak_kl"].item() == pytest.approx(fit.peak_kl)
    assert found["kl_left"].item() == pytest.approx(fit.peak_kl - kl.mean().item())
    assert found["kl_left"] < 0 < found["excess_gap_lower"]
    rank = RF.spearman_correlation(proxies, golds)
    assert found["rank_correlation"].item() == pytest.approx(rank.item())


def test_cut_and_order_do_not_matter():
    rows = goodhart_rows()
    whole = numbers(filled(rows).compute())
    assert numbers(filled(rows, cuts=3).compute()) == pytest.approx(whole, rel=1e-12)
    assert numbers(filled(rows[::-1]).compute()) == pytest.approx(whole, rel=1e-12)
    metric = filled(rows)
    metric.reset()
    metric.update(*rows[0])
    assert metric.compute()["gap"] == 0


def test_states_stay_float64_when_their_module_is_cast():
    rows = goodhart_rows()
    module = nn.ModuleDict({"metric": filled(rows[:5])}).to(torch.bfloat16)
    for row in rows[5:]:
        module["metric"].update(*row)
    assert numbers(module["metric"].compute()) == pytest.approx(numbers(filled(rows).compute()), rel=1e-12)


def test_too_little_is_nan_and_no_peak_is_infinite():
    assert all(math.isnan(value) for value in numbers(GoodhartGap().compute()).values())
    rows = goodhart_rows()
    early = numbers(filled(rows[:3]).compute())
    assert math.isnan(early["alpha"])
    assert math.isfinite(early["gap"])
    rising = numbers(filled([(s, kl, proxy, 3 * kl + proxy) for s, kl, proxy, _ in rows]).compute())
    assert rising["peak_kl"] == rising["kl_left"] == math.inf


def test_bad_input_is_named():
    metric = GoodhartGap()
    with pytest.raises(ValueError, match="kl has shape"):
        metric.update(0, torch.zeros(3), torch.zeros(2), torch.zeros(2))
    metric.update(0, torch.zeros(2), torch.tensor([0.0, math.nan]), torch.zeros(2))
    with pytest.raises(ValueError, match="GoodhartGap was given kl, proxy or gold that is nan"):
        metric.compute()
    with pytest.raises(ValueError, match="method must be"):
        GoodhartGap(method="ppo")
    with pytest.raises(ValueError, match="has seen no sample"):
        GoodhartGap().curve()


def test_plot_shows_curves_fit_and_peak(tmp_path):
    metric = filled(goodhart_rows())
    figure, axes = metric.plot()
    figure.savefig(tmp_path / "curve.png")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    peak = metric.fit().peak_kl
    assert labels == ["proxy", "gold", "gold fitted by d (α − β ln d)", f"peak at KL {peak:.3g}"]
    proxy, gold = axes.lines[:2]
    curve = metric.curve()
    assert proxy.get_ydata() == pytest.approx(curve.proxy.numpy())
    assert gold.get_xdata() == pytest.approx(curve.kl.sqrt().numpy())
    assert len(axes.collections) == 2  # the bands
    again, same = metric.plot(ax=axes)
    assert again is None
    assert same is axes
    two, _ = filled(goodhart_rows()[:2]).plot()
    two.savefig(tmp_path / "two.png")
