import pytest
import torch
from torch import nn

from lightning_rlhf.metrics import Mean, Total


def test_split_batches_equal_the_whole():
    values = torch.randn(100)
    whole, split = Mean(), Mean()
    whole.update(values)
    for part in values.split([1, 9, 90]):
        split.update(part)
    assert split.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)
    assert whole.compute().item() == pytest.approx(values.double().mean().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_stay_float64_when_their_module_is_cast(dtype):
    module = nn.ModuleDict({"mean": Mean(), "total": Total()}).to(dtype)
    for _ in range(1000):
        module["total"].update(1)
        module["mean"].update(torch.ones(()))
    assert module["total"].compute().item() == 1000
    assert module["mean"].count.item() == 1000
    module["mean"].reset()
    assert module["mean"].total.dtype == torch.float64


def test_total_is_kept_in_checkpoints_and_mean_is_not():
    module = nn.ModuleDict({"mean": Mean(), "total": Total()})
    module["total"].update(5)
    assert module.state_dict() == {"total.total": torch.tensor(5.0)}
    again = nn.ModuleDict({"mean": Mean(), "total": Total()})
    again.load_state_dict(module.state_dict())
    assert again["total"].compute().item() == 5


def test_updates_carry_no_graph():
    metric = Mean()
    metric.update(torch.ones(2, requires_grad=True) * 2)
    assert not metric.total.requires_grad
