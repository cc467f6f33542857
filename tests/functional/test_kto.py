import math

import pytest
import torch

from lightning_rlhf.functional import apo_zero_unpaired_loss, kto_loss, kto_reference_point

GOOD, BAD = torch.tensor([True]), torch.tensor([False])
ZERO = torch.zeros(1)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def one(value):
    return torch.tensor([float(value)], dtype=torch.float64)


def test_by_hand():
    """β (r − z) = 0.5 · (3 − 1) = 1."""
    policy, reference = one(-4), one(-7)
    weights = {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    assert kto_loss(policy, reference, GOOD, 1.0, **weights).item() == pytest.approx(2 * (1 - sigmoid(1)))
    assert kto_loss(policy, reference, BAD, 1.0, **weights).item() == pytest.approx(3 * (1 - sigmoid(-1)))
    assert apo_zero_unpaired_loss(policy, reference, GOOD, **weights).item() == pytest.approx(
        2 * (1 - sigmoid(1.5))
    )
    assert apo_zero_unpaired_loss(policy, reference, BAD, **weights).item() == pytest.approx(3 * sigmoid(1.5))


def test_half_where_nothing_has_moved_and_limits_far_away():
    for labels in (GOOD, BAD):
        assert kto_loss(ZERO, ZERO, labels, 0.0, beta=0.3).item() == 0.5
    far = torch.tensor([1e4, -1e4])
    losses = kto_loss(far, torch.zeros(2), torch.tensor([True, True]), 0.0, beta=1.0)
    assert losses.tolist() == [0.0, 1.0]
    assert kto_loss(far, torch.zeros(2), torch.tensor([0, 0]), 0.0, beta=1.0).tolist() == [1.0, 0.0]


def test_small_losses_keep_their_digits():
    """1 − σ(40) is e^−40, not 0."""
    assert kto_loss(torch.tensor([40.0]), ZERO, GOOD, 0.0, beta=1.0).item() == pytest.approx(
        math.exp(-40), rel=1e-5
    )


def test_the_gradient_pushes_desirable_up_and_undesirable_down():
    """d/dr of w (1 − σ(β(r − z))) is −w β σ(1 − σ); with the sign turned for undesirable ones."""
    policy = torch.tensor([0.7, 0.7], dtype=torch.float64, requires_grad=True)
    loss = kto_loss(
        policy, torch.zeros(2).double(), torch.tensor([1, 0]), 0.2, beta=2.0, desirable_weight=1.5
    )
    loss.sum().backward()
    slope = 2.0 * sigmoid(1) * (1 - sigmoid(1))
    assert policy.grad.tolist() == pytest.approx([-1.5 * slope, slope])


def test_gradcheck():
    draw = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(4, dtype=torch.float64, generator=draw) for _ in range(2))
    labels = torch.tensor([True, False, True, False])
    assert torch.autograd.gradcheck(
        lambda logps: kto_loss(logps, reference, labels, 0.3, beta=0.7), policy.requires_grad_()
    )


def test_each_row_on_its_own():
    draw = torch.Generator().manual_seed(1)
    policy, reference = (torch.randn(5, generator=draw) for _ in range(2))
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    whole = kto_loss(policy, reference, labels, 0.1, beta=0.4)
    parts = [
        kto_loss(policy[i : i + 1], reference[i : i + 1], labels[i : i + 1], 0.1, beta=0.4) for i in range(5)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_the_reference_point_by_hand():
    """Mean of 3 and −1 is 1; β is not in it. Below 0 it is cut off, after the mean and not before."""
    policy = torch.tensor([-1.0, -5.0], requires_grad=True)
    point = kto_reference_point(policy, torch.tensor([-4.0, -4.0]))
    assert point.item() == 1.0
    assert not point.requires_grad
    assert kto_reference_point(torch.tensor([1.0, -3.0]), torch.zeros(2)).item() == 0.0


def test_the_reference_point_over_ranks_is_the_mean_over_all_rows():
    """Three rows here (sum −3), one on another process (7): their mean is 1, not the mean 3 of the two means."""
    here = torch.tensor([-1.0, 0.0, -2.0])
    point = kto_reference_point(
        here, torch.zeros(3), sum_over_ranks=lambda parts: parts + torch.tensor([7.0, 1.0])
    )
    assert point.item() == 1.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"beta": 0.1, "desirable_weight": -1.0}, "desirable_weight must not be negative, got -1.0"),
        ({"beta": 0.1, "undesirable_weight": -2.0}, "undesirable_weight must not be negative, got -2.0"),
    ],
)
def test_ranges(bad, message):
    with pytest.raises(ValueError, match=message):
        kto_loss(ZERO, ZERO, GOOD, 0.0, **bad)
    with pytest.raises(ValueError, match=message):
        apo_zero_unpaired_loss(ZERO, ZERO, GOOD, **bad)
