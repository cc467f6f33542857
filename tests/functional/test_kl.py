import pytest
import torch

from lightning_rlhf.functional import kl_k1, kl_k2, kl_k3

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def test_by_hand():
    logprobs, ref = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert kl_k1(logprobs, ref).item() == pytest.approx(0.5)
    assert kl_k2(logprobs, ref).item() == pytest.approx(0.125)
    assert kl_k3(logprobs, ref).item() == pytest.approx(0.10653066)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_unbiased_under_the_policy(estimator):
    exact = (P * (P.log() - Q.log())).sum()
    assert (P * estimator(P.log(), Q.log())).sum().item() == pytest.approx(exact.item(), rel=1e-12)


def test_k2_is_second_order_near_zero():
    near = Q * 1.001 ** torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    near = near / near.sum()
    exact = (near * (near.log() - Q.log())).sum()
    assert (near * kl_k2(near.log(), Q.log())).sum().item() == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize("estimator", [kl_k2, kl_k3])
def test_never_negative_and_zero_at_equality(estimator):
    delta = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert (estimator(delta, torch.zeros_like(delta)) >= 0).all()
    assert estimator(delta, delta).abs().max() == 0


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
def test_gradcheck(estimator):
    logprobs = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: estimator(x, Q.log().mean()), logprobs)
