import math

import pytest
import torch

from lightning_rlhf.functional import masked_mean, masked_var, masked_whiten

VALUES = torch.tensor([[1.0, 2.0, math.inf], [4.0, math.nan, -math.inf]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_mean_by_hand_and_blind_to_the_padding():
    assert masked_mean(VALUES, MASK).item() == pytest.approx(7 / 3)
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [1.5, 4.0]


def test_mean_of_nothing_is_zero():
    assert masked_mean(VALUES, torch.zeros_like(MASK)).item() == 0.0


def test_gradient_ignores_the_padding():
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    assert values.grad[MASK].tolist() == pytest.approx([1 / 3] * 3)
    assert (values.grad[~MASK] == 0).all()


def test_variance_equals_torch_on_what_counts():
    kept = VALUES[MASK]
    assert masked_var(VALUES, MASK).item() == pytest.approx(kept.var().item())
    assert masked_var(VALUES, MASK, unbiased=False).item() == pytest.approx(kept.var(unbiased=False).item())


def test_variance_of_one_value_is_refused():
    with pytest.raises(ValueError, match="at least 2 values"):
        masked_var(VALUES, torch.tensor([[True, False, False], [False, False, False]]))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean):
    white = masked_whiten(VALUES, MASK, shift_mean=shift_mean)
    kept = white[MASK]
    assert kept.std().item() == pytest.approx(1.0, abs=1e-5)
    assert kept.mean().item() == pytest.approx(0.0 if shift_mean else 7 / 3, abs=1e-5)
    assert (white[~MASK] == 0).all()
    assert (kept.argsort() == VALUES[MASK].argsort()).all()  # a flipped sign would reverse the order
