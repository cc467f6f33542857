import math

import pytest
import torch

from lightning_rlhf.functional import dpo_loss, implicit_rewards, pairwise_accuracy


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_dpo_by_hand():
    # h = (−10 + 12) − (−20 + 21) = 1
    loss = dpo_loss(numbers(-10), numbers(-20), numbers(-12), numbers(-21), beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_label_smoothing_by_hand():
    loss = dpo_loss(numbers(-10), numbers(-20), numbers(-12), numbers(-21), beta=0.5, label_smoothing=0.1)
    kept, flipped = math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))
    assert loss.item() == pytest.approx(0.9 * kept + 0.1 * flipped)


def test_ln_2_where_policy_and_reference_agree():
    logps = torch.randn(5, dtype=torch.float64)
    assert dpo_loss(logps, logps - 3, logps, logps - 3, beta=0.3).tolist() == pytest.approx([math.log(2)] * 5)


def test_gradient_raises_chosen_and_lowers_rejected():
    chosen, rejected = numbers(-3.0).requires_grad_(), numbers(-3.0).requires_grad_()
    dpo_loss(chosen, rejected, numbers(-3.0), numbers(-3.0), beta=0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.05)
    assert rejected.grad.item() == pytest.approx(0.05)


def test_smoothed_loss_has_its_minimum_at_the_flip_rates_log_odds():
    margins = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    zero = torch.zeros_like(margins)
    best = margins[dpo_loss(margins, zero, zero, zero, beta=1.0, label_smoothing=0.2).argmin()]
    assert best.item() == pytest.approx(math.log(0.8 / 0.2), abs=0.01)


def test_gradcheck():
    inputs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta=0.7, label_smoothing=0.1), inputs)


@pytest.mark.parametrize(("beta", "smoothing", "match"), [(0.0, 0.0, "beta"), (0.1, 0.5, "label_smoothing")])
def test_refuses_what_is_out_of_range(beta, smoothing, match):
    with pytest.raises(ValueError, match=match):
        dpo_loss(numbers(0), numbers(0), numbers(0), numbers(0), beta=beta, label_smoothing=smoothing)


def test_rewards_and_accuracy():
    assert implicit_rewards(numbers(-1, -5), numbers(-3, -4), beta=0.5).tolist() == [1.0, -0.5]
    assert pairwise_accuracy(numbers(2, 1, 0), numbers(1, 2, 0)).tolist() == [1.0, 0.0, 0.5]
