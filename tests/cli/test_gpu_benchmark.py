"""The GPU benchmark on a CPU with a tiny shape: that it runs, and that both sides compute the same."""

import importlib.util
import json
import math

import pytest

from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.models.attention import MIN_FLEX_HEAD_DIM
from tests.benchmarks import gpu
from tests.benchmarks.gpu_models import SHAPES, config_of, flops

SIZES = {"0.5b": 0.49, "1.5b": 1.54, "8b": 8.03, "32b": 32.8, "70b": 70.6}


@pytest.mark.parametrize("shape", SIZES)
def test_shapes_have_their_size(shape):
    """FLOPs of a forward by hand: 2 a weight and token, and the embedding is only looked up."""
    *_, vocabulary, tied = SHAPES[shape]
    hidden = config_of(shape).hidden_size
    one = pack([PromptGroup([5], [[5]])])  # two tokens, one target: attention is next to nothing
    weights = (flops(shape, one, "sft") / 4 - hidden * vocabulary) / 2
    total = weights + hidden * vocabulary * (1 if tied else 2)
    assert total / 1e9 == pytest.approx(SIZES[shape], rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_are_as_wide_as_every_backend_needs(shape):
    config = config_of(shape)
    assert config.hidden_size // config.num_attention_heads >= MIN_FLEX_HEAD_DIM


def test_it_runs_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "report.json"
    tiny = ["--device", "cpu", "--shape", "tiny", "--lengths", "12+8", "--batch-size", "2", "--steps", "1"]
    assert gpu.main([*tiny, "--only", "dpo", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    (result,) = json.loads(path.read_text())["results"]
    assert "| DPO |" in printed
    assert result["ours"]["tokens"] == [2 * (12 + 2 * 8)]
    # Two pairs, policy and reference equal at the start.
    assert result["ours"]["losses"][0] == pytest.approx(2 * math.log(2), rel=1e-3)
    assert result["ours"]["matmul_share"] > 0
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed: ours alone was measured")
    assert result["trl"]["tokens"] == [2 * 2 * (12 + 8)]
    assert result["trl"]["losses"] == pytest.approx(result["ours"]["losses"], rel=2e-2)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("skipped: there is no CUDA device")
