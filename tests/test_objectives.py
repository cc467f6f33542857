"""Objectives as data: plain values and back, what they need, and sums of them."""

import pytest
import torch

from lightning_rlhf import functional as RF
from lightning_rlhf import objectives
from lightning_rlhf.objectives import (
    BCO,
    IPO,
    ORPO,
    AOTUnpaired,
    Completions,
    Objective,
    SFTTerm,
    Sigmoid,
    SimPO,
    Weighted,
)

BASES = {"Objective", "WithReference", "Margin", "Weighted"}
CLASSES = [
    thing
    for name in objectives.__all__
    if issubclass(thing := getattr(objectives, name), Objective) and name not in BASES
]


def completions(reference=True):
    logps = -torch.rand(6) * 5
    return Completions(logps, torch.tensor([3, 4, 1, 7, 5, 2]), logps - torch.randn(6) if reference else None)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_objective(cls):
    """Round trip, one finite loss and metric a pair, a gradient, no look at a reference it does not need."""
    objective = cls()
    config = objective.to_config()
    assert config["class_path"] == f"lightning_rlhf.objectives.{cls.__name__}"
    assert Objective.from_config(config) == objective
    given = completions(objective.needs_reference)
    given.logps.requires_grad_()
    pairs = given.pairs()
    losses = objective(pairs)
    assert losses.shape == (3,)
    losses.sum().backward()
    assert given.logps.grad[0::2].abs().sum() > 0
    values = objective.metrics(pairs)
    assert {"loss", *values} == set(objective.metric_names)
    assert all(v.shape == (3,) and v.isfinite().all() for v in values.values())


@pytest.mark.parametrize("cls", [c for c in CLASSES if c.needs_reference], ids=lambda cls: cls.__name__)
def test_a_missing_reference_is_named(cls):
    with pytest.raises(ValueError, match="needs the reference's log-probabilities"):
        cls()(completions(reference=False).pairs())


def test_a_weighted_sum():
    total = Weighted([Sigmoid(beta=0.2), SFTTerm("sequences")], [0.7, 0.3])
    pairs = completions().pairs()
    expected = 0.7 * Sigmoid(beta=0.2)(pairs) + 0.3 * SFTTerm("sequences")(pairs)
    torch.testing.assert_close(total(pairs), expected)
    again = Objective.from_config(total.to_config())
    assert again == total
    assert hash(again) == hash(total)
    assert total.to_config()["init_args"] == {
        "objectives": [
            {
                "class_path": "lightning_rlhf.objectives.Sigmoid",
                "init_args": {
                    "beta": 0.2,
                    "divergence": "reverse_kl",
                    "divergence_alpha": 0.5,
                    "label_smoothing": 0.0,
                },
            },
            {"class_path": "lightning_rlhf.objectives.SFTTerm", "init_args": {"average": "sequences"}},
        ],
        "weights": [0.7, 0.3],
    }
    assert total.metrics(pairs)["rewards/chosen"].equal(0.2 * (pairs.chosen.logps - pairs.chosen.ref_logps))


@pytest.mark.parametrize(
    ("parts", "reference", "mean", "sorts"),
    [
        ([SimPO(), SFTTerm()], False, False, False),
        ([SimPO(), IPO()], True, False, False),
        ([BCO(), SFTTerm()], True, True, False),
        ([Sigmoid(), AOTUnpaired()], True, False, True),
        ([ORPO(), Weighted([IPO()], [1.0])], True, False, False),
    ],
)
def test_a_sum_needs_what_its_parts_need(parts, reference, mean, sorts):
    total = Weighted(parts, [1.0] * len(parts))
    assert (total.needs_reference, total.needs_reward_mean, total.sorts_batch) == (reference, mean, sorts)


@pytest.mark.parametrize(("parts", "weights"), [([], []), ([Sigmoid()], [1.0, 2.0])])
def test_weights_that_do_not_fit_are_refused(parts, weights):
    with pytest.raises(ValueError, match=f"got {len(parts)} objectives and {len(weights)} weights"):
        Weighted(parts, weights)


def test_another_divergence_reads_scores_in_place_of_ratios():
    pairs = completions().pairs()
    chosen, rejected, ref_chosen, ref_rejected = pairs.logps
    scores = [
        RF.divergence_scores(x, divergence="js") for x in (chosen - ref_chosen, rejected - ref_rejected)
    ]
    expected = -torch.nn.functional.logsigmoid(0.3 * (scores[0] - scores[1]))
    torch.testing.assert_close(Sigmoid(beta=0.3, divergence="js")(pairs), expected)


def test_the_running_mean_reaches_bco():
    given = completions()
    shifted = given.pairs(torch.tensor(0.7, dtype=torch.float64))
    assert BCO(0.5)(shifted).dtype == torch.float32
    torch.testing.assert_close(BCO(0.5)(shifted), RF.bco_loss(*shifted.logps, torch.tensor(0.7), beta=0.5))
    assert not torch.allclose(BCO(0.5)(shifted), BCO(0.5)(given.pairs()))


def test_what_is_no_objective_is_refused():
    with pytest.raises(TypeError, match=r"lightning_rlhf.metrics.Mean is no preference objective"):
        Objective.from_config({"class_path": "lightning_rlhf.metrics.Mean", "init_args": {}})
