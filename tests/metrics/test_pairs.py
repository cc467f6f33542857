"""The metrics over pairs and annotators."""

import gzip
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import CohenKappa, MetricCollection

from lightning_rlhf import functional
from lightning_rlhf.metrics import (
    AnnotatorAgreement,
    CalibrationError,
    LengthCorrelation,
    LongerWins,
    Margins,
    PairwiseAccuracy,
)
from tests.metrics.conftest import NAMES, batch, make, numbers

pytestmark = pytest.mark.filterwarnings("ignore:the calibration error is measured on")


def value_of(name, *rows):
    metric = make(name)
    metric.update(*rows)
    return numbers(metric.compute())


# --- what holds for each of them ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [[1, 9, 91], [100, 0, 1]])
@pytest.mark.parametrize("forward", [False, True])
def test_split_batches_equal_the_whole(name, parts, forward):
    split = make(name)
    for part in zip(*(tensor.split(parts) for tensor in batch(name)), strict=True):
        (split if forward else split.update)(*part)
    assert numbers(split.compute()) == pytest.approx(value_of(name, *batch(name)), rel=1e-12)
    split.reset()
    split.update(*batch(name, seed=1))
    assert numbers(split.compute()) == pytest.approx(value_of(name, *batch(name, seed=1)), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_stay_float64_when_their_module_is_cast(name, dtype):
    rows = batch(name, rows=5000)
    module = nn.ModuleDict({"metric": make(name)})
    metric = module["metric"]
    metric.update(*(tensor[:4500] for tensor in rows))
    metric.compute()  # a cached result may not be cast either
    module.to(dtype)
    assert numbers(metric.compute()) == value_of(name, *(tensor[:4500] for tensor in rows))
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(*(tensor[4500:] for tensor in rows))
    assert numbers(metric.compute()) == pytest.approx(value_of(name, *rows), rel=1e-12)
    metric.reset()
    assert all(getattr(metric, state).dtype == torch.float64 for state in metric.metric_state)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_and_an_empty_metric(name):
    rows = batch(name)
    empty = [tensor[:0] for tensor in rows]
    metric = make(name)
    metric.update(*empty)
    seen_nothing = numbers(metric.compute())
    assert all(np.isnan(value) for key, value in seen_nothing.items() if key not in ("lower", "upper"))
    metric.update(*rows)
    metric.update(*empty)
    assert numbers(metric.compute()) == pytest.approx(value_of(name, *rows), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_can_be_copied_and_read_in_inference_mode(name):
    metric = make(name)
    with torch.inference_mode():
        metric.update(*batch(name, rows=50))
    again = pickle.loads(pickle.dumps(metric))
    again.update(*batch(name, rows=50, seed=1))
    metric.merge_state(_updated(name))
    assert numbers(again.compute()) == pytest.approx(numbers(metric.compute()), rel=1e-12)


def _updated(name):
    metric = make(name)
    metric.update(*batch(name, rows=50, seed=1))
    return metric


@pytest.mark.parametrize("name", NAMES)
def test_updates_carry_no_graph(name):
    rows = [
        tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor for tensor in batch(name)
    ]
    metric = make(name)
    metric.update(*rows)
    assert not any(getattr(metric, state).requires_grad for state in metric.metric_state)


@pytest.mark.parametrize("name", NAMES)
def test_what_torchmetrics_asks_for(name):
    metric = make(name)
    assert metric.full_state_update is False
    assert metric.is_differentiable is False
    assert metric.higher_is_better is {
        "PairwiseAccuracy": True,
        "AnnotatorAgreement": True,
        "CalibrationError": False,
    }.get(name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "AnnotatorAgreement"])
def test_shapes_that_would_broadcast_are_refused(name):
    with pytest.raises(ValueError, match=r"has shape \(4,\) and .* \(4, 1\): give both the same shape"):
        make(name).update(torch.zeros(4), torch.zeros(4, 1))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "AnnotatorAgreement"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_told_when_the_metric_is_read(name, bad):
    metric = make(name)
    metric.update(torch.tensor([0.0, bad, 1.0]), torch.tensor([1.0, 2.0, 4.0]))
    metric.update(*batch(name))
    with pytest.raises(ValueError, match=f"{name} was given .* nan or infinite since its last reset"):
        metric.compute()
    metric.reset()
    metric.update(*batch(name))
    assert numbers(metric.compute()) == value_of(name, *batch(name))


# --- each against its twin, and by hand ---


def test_pairwise_accuracy():
    chosen, rejected = batch("PairwiseAccuracy")
    wins = functional.pairwise_accuracy(chosen, rejected)
    lower, upper = functional.wilson_interval(wins.sum(), len(wins))
    expected = {"accuracy": wins.mean().item(), "lower": lower.item(), "upper": upper.item()}
    assert value_of("PairwiseAccuracy", chosen, rejected) == pytest.approx(expected)
    ties = value_of("PairwiseAccuracy", torch.zeros(10), torch.zeros(10))
    assert ties["accuracy"] == 0.5
    assert (ties["lower"] + ties["upper"]) / 2 == pytest.approx(0.5)


def test_pairwise_accuracy_with_another_confidence():
    metric = PairwiseAccuracy(confidence=0.5)
    metric.update(torch.ones(4), torch.tensor([0.0, 0.0, 0.0, 2.0]))
    lower, upper = functional.wilson_interval(3, 4, confidence=0.5)
    assert numbers(metric.compute()) == {"accuracy": 0.75, "lower": lower.item(), "upper": upper.item()}
    for metric_class in (PairwiseAccuracy, LongerWins):
        with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), got 95"):
            metric_class(confidence=95)


def test_calibration_error():
    chosen, rejected = batch("CalibrationError")
    metric = CalibrationError(num_bins=5)
    metric.update(chosen, rejected)
    margins = chosen.double() - rejected.double()
    assert metric.compute() == functional.calibration_error(margins, num_bins=5)
    for ours, expected in zip(metric.curve(), functional.reliability_curve(margins, num_bins=5), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        CalibrationError(num_bins=0)


def test_few_pairs_are_warned_of_once():
    metric = CalibrationError()
    metric.update(torch.zeros(2999), torch.zeros(2999))
    with pytest.warns(UserWarning, match=r"measured on 2999 pairs, which is too few.* Use at least 3000"):
        metric.compute()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.reset()
        metric.update(torch.zeros(10), torch.zeros(10))
        metric.compute()
        enough = CalibrationError()
        enough.update(torch.zeros(3000), torch.zeros(3000))
        enough.compute()


def test_margins():
    chosen, rejected = batch("Margins")
    margins = (chosen.double() - rejected.double()).numpy()
    expected = {"mean": margins.mean(), "std": margins.std(ddof=1)}
    assert value_of("Margins", chosen, rejected) == pytest.approx(expected, rel=1e-12)
    mean, std = functional.mean_and_std(chosen.double() - rejected.double())
    assert (mean.item(), std.item()) == pytest.approx(tuple(expected.values()), rel=1e-12)


def test_length_correlation():
    rewards, lengths = batch("LengthCorrelation")
    expected = np.corrcoef(rewards, lengths)[0, 1]
    assert expected > 0.2
    assert value_of("LengthCorrelation", rewards, lengths)["value"] == pytest.approx(expected, rel=1e-6)
    assert functional.length_correlation(rewards, lengths).item() == pytest.approx(expected, rel=1e-6)


def test_length_correlation_does_not_cancel():
    """Rewards around 10,000 in batches of 16; float32 sums of squares would have no digit left."""
    lengths = torch.randint(1, 500, (4096,))
    rewards = 10_000 + torch.randn(4096, dtype=torch.float64) + 0.005 * lengths
    metric = LengthCorrelation()
    for a, b in zip(rewards.split(16), lengths.split(16), strict=True):
        metric.update(a, b)
    assert metric.compute().item() == pytest.approx(np.corrcoef(rewards, lengths)[0, 1], rel=1e-9)


def test_longer_wins():
    value = value_of("LongerWins", torch.tensor([9, 7, 3, 5]), torch.tensor([4, 2, 8, 5]))
    assert value["accuracy"] == 0.625
    lower, upper = functional.wilson_interval(2.5, 4)
    assert (value["lower"], value["upper"]) == (lower.item(), upper.item())


def test_annotator_agreement():
    (labels,) = batch("AnnotatorAgreement")
    value = value_of("AnnotatorAgreement", labels)
    kappas, agreements = [], []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        kappas.append(functional.cohen_kappa(labels[:, a], labels[:, b]).item())
        agreements.append((labels[:, a] == labels[:, b]).double().mean().item())
        assert value[f"kappa_{a}_{b}"] == pytest.approx(kappas[-1])
        assert value[f"agreement_{a}_{b}"] == pytest.approx(agreements[-1])
        theirs = CohenKappa(task="multiclass", num_classes=3)(labels[:, a], labels[:, b])
        assert kappas[-1] == pytest.approx(theirs.item(), abs=1e-6)
    assert len(set(kappas)) == 3
    assert value["kappa"] == pytest.approx(np.mean(kappas))
    assert value["agreement"] == pytest.approx(np.mean(agreements))


def test_annotator_agreement_refuses():
    metric = AnnotatorAgreement(num_annotators=3, num_classes=2)
    with pytest.raises(ValueError, match=r"labels has shape \(4, 2\): give \(N, 3\)"):
        metric.update(torch.zeros(4, 2).long())
    with pytest.raises(ValueError, match="labels_b is 2 in row 1, but classes go from 0 to 1"):
        metric.update(torch.tensor([[0, 0, 0], [0, 2, 0]]))
    with pytest.raises(ValueError, match="labels_a must be integers"):
        metric.update(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least two annotators and two classes, got 1 and 2"):
        AnnotatorAgreement(num_annotators=1, num_classes=2)


@pytest.mark.assets
def test_three_humans_agree_as_published(assets):
    """Wang et al. (2023), "PandaLM": Cohen's kappa between the three annotators is 0.85, 0.88 and 0.86."""
    with gzip.open(assets / "preferences" / "pandalm_human3.jsonl.gz", "rt") as file:
        votes = torch.tensor([json.loads(line)["human"] for line in file])
    metric = AnnotatorAgreement(num_annotators=3, num_classes=3)
    for part in votes.split(100):
        metric.update(part)
    value = metric.compute()
    assert [round(value[f"kappa_{pair}"].item(), 2) for pair in ("0_1", "0_2", "1_2")] == [0.85, 0.88, 0.86]


# --- together ---


def test_a_collection_flattens_and_never_confuses_its_metrics():
    """torchmetrics merges metrics whose states are equal after a batch: here accuracy and "the longer wins" are."""
    together = MetricCollection([PairwiseAccuracy(), LongerWins(), Margins(), CalibrationError()])
    for chosen_lengths in (torch.tensor([9, 9]), torch.tensor([1, 1])):
        together.update(
            chosen=torch.ones(2),
            rejected=torch.zeros(2),
            chosen_lengths=chosen_lengths,
            rejected_lengths=torch.tensor([5, 5]),
        )
    values = together.compute()
    assert values["PairwiseAccuracy_accuracy"] == 1.0
    assert values["LongerWins_accuracy"] == 0.5
    assert values["Margins_mean"] == 1.0
    assert values["CalibrationError"].item() == pytest.approx(1 - torch.sigmoid(torch.ones(())).item())


# --- pictures ---


def test_reliability_diagram():
    metric = CalibrationError()
    metric.update(torch.tensor([0.0, 9.0, 9.0, -9.0]), torch.zeros(4))
    figure, axes = metric.plot()
    line = axes.get_lines()[1]
    assert line.get_xdata().tolist() == pytest.approx([0.5, torch.sigmoid(torch.tensor(9.0)).item()])
    assert line.get_ydata().tolist() == pytest.approx([0.5, 2 / 3])
    assert [text.get_text() for text in axes.texts] == ["1", "3"]
    assert "0.250 on 4 pairs" in axes.get_title()  # 3/4 * (1 - 2/3)
    nothing, same = metric.plot(functional.reliability_curve(torch.ones(5)), figure.add_subplot())
    assert nothing is None
    assert "on 5 pairs" in same.get_title()
    figure.clear()


def test_table_of_kappas():
    metric = AnnotatorAgreement(num_annotators=3, num_classes=2)
    metric.update(torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 1, 1]]))
    figure, axes = metric.plot()
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(texts) == 6
    assert texts[0, 1] == texts[1, 0] == "κ 0.50\n75% agree"
    assert texts[0, 2] == "κ 1.00\n100% agree"
    assert "mean kappa 0.67" in axes.get_title()
    figure.clear()


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in NAMES if name != "AnnotatorAgreement"])
def test_updates_do_not_wait_for_the_device(name):
    metric = make(name).to("cuda")
    rows = [tensor.cuda() for tensor in batch(name)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(*rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert numbers(metric.compute()) == pytest.approx(value_of(name, *batch(name)), rel=1e-12)


@pytest.mark.gpu
def test_annotators_on_a_gpu():
    (labels,) = batch("AnnotatorAgreement")
    metric = make("AnnotatorAgreement").to("cuda")
    metric.update(labels.cuda())
    assert numbers(metric.compute()) == pytest.approx(value_of("AnnotatorAgreement", labels), rel=1e-12)
    assert metric.plot()[1].texts
