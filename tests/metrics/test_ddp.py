import json

import pytest

from lightning_rlhf.metrics import GoodhartGap
from tests.metrics.conftest import NAMES, batch, goodhart_rows, make, numbers
from tests.metrics.ddp_worker import work
from tests.processes import fork


def test_two_processes_equal_one(tmp_path):
    fork(work, tmp_path, world=2)
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert str(one) == str(two)
    for name in NAMES:
        metric = make(name)
        metric.update(*batch(name))
        whole = numbers(metric.compute())
        assert one[name] == pytest.approx(whole, rel=1e-12), name
        assert one[f"{name} on one rank"] == pytest.approx(whole, rel=1e-12), name
        if name == "CalibrationError":
            for ours, expected in zip(one["curve"], metric.curve(), strict=True):
                assert ours == pytest.approx(expected.tolist(), rel=1e-12, nan_ok=True)
    metric = GoodhartGap()
    for row in goodhart_rows():
        metric.update(*row)
    for key in ("GoodhartGap", "GoodhartGap on one rank"):
        assert one[key] == pytest.approx(numbers(metric.compute()), rel=1e-12), key
