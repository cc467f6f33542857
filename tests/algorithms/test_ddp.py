import pytest
import torch

from tests.algorithms.ddp_worker import main
from tests.processes import fork


def run(algorithm, model_dir, lora, world, output):
    fork(main, algorithm, model_dir, lora, world, str(output), world=world)
    return [torch.load(f"{output}.{rank}", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize(
    ("algorithm", "lora"),
    [
        ("SFT", "full"),
        ("DPO", "lora"),
        ("BCO", "full"),
        ("KTO", "lora"),
        ("RewardModel", "lora"),
        ("TokenHead", "lora"),
        ("OnlineDPO", "lora"),
    ],
)
def test_two_processes_equal_one(algorithm, lora, llama_dir, tmp_path):
    (one,) = run(algorithm, llama_dir, lora, 1, tmp_path / "one")
    two = run(algorithm, llama_dir, lora, 2, tmp_path / "two")
    assert len(one["gradients"]) == 2
    for rank in two:
        for a, b in zip(one["gradients"], rank["gradients"], strict=True):
            assert (a - b).norm() / a.norm() < 1e-5
        assert rank["metrics"] == two[0]["metrics"]
    if algorithm == "KTO":  # its reference point is that of all rows, on both ranks
        assert two[0]["points"] == two[1]["points"]
        assert one["points"][1] > 1e-2  # at the first step, after the sanity check of validation
        torch.testing.assert_close(two[0]["points"], one["points"])
    assert torch.equal(two[0]["weights"], two[1]["weights"])  # every adapter is equal on both ranks
    assert two[0]["metrics"].keys() == one["metrics"].keys()
    for name, value in one["metrics"].items():
        if name in ("train/min_reward", "train/max_reward", "val/min_reward", "val/max_reward"):
            continue  # means over batches, which are smaller here
        assert two[0]["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
