import pytest
import torch
from torch import nn

from lightning_rlhf.metrics import Correlation


def data(offset=0.0):
    x = torch.randn(200, dtype=torch.float64)
    return x + offset, 0.6 * x + torch.randn(200, dtype=torch.float64)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_split_batches_equal_the_whole(offset):
    x, y = data(offset)
    metric = Correlation()
    for a, b in zip(x.split([1, 9, 90, 100]), y.split([1, 9, 90, 100]), strict=True):
        metric.update(a, b)
    metric.update(x[:0], y[:0])
    assert metric.compute().item() == pytest.approx(
        torch.corrcoef(torch.stack([x, y]))[0, 1].item(), rel=1e-7
    )
    metric.reset()
    metric.update(x, -x)
    assert metric.compute().item() == pytest.approx(-1)


def test_processes_are_merged():
    """What torchmetrics does when it reads a metric under two processes: states are stacked."""
    x, y = data()
    parts = [Correlation(), Correlation()]
    for metric, half in zip(parts, (slice(0, 50), slice(50, 200)), strict=True):
        metric.update(x[half], y[half])
    both = Correlation()
    both.moments = torch.stack([metric.moments for metric in parts])
    both._update_count = 1
    assert both.compute().item() == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item(), rel=1e-9)


def test_nan_where_nothing_varies():
    metric = Correlation()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([3, 3]))
    assert metric.compute().isnan()


def test_states_stay_float64():
    module = nn.ModuleDict({"correlation": Correlation()}).to(torch.bfloat16)
    x, y = data(100.0)
    module["correlation"].update(x, y)
    assert module["correlation"].compute().item() == pytest.approx(
        torch.corrcoef(torch.stack([x, y]))[0, 1].item(), rel=1e-9
    )
