"""DeepSpeed's ZeRO, stages 1 and 2, in processes on CPUs: its cells are held to what those of the matrix are.

DeepSpeed is no dependency, and where it is missing this is skipped. To run it::

    DS_BUILD_OPS=0 pip install deepspeed
    DS_ACCELERATOR=cpu pytest tests/strategies/test_deepspeed.py
"""

import re

import pytest
import torch

from tests.processes import run_module
from tests.strategies.test_matrix import Runs, check, check_export, exported, launch
from tests.strategies.zero import CLIP, SGD, accumulated, validated

pytest.importorskip("deepspeed", reason="deepspeed is not installed: DS_BUILD_OPS=0 pip install deepspeed")
pytestmark = pytest.mark.timeout(1200)
CELLS = sorted(
    {
        *(
            f"{a}-{w}-zero2"
            for a in ("SFT", "RewardModel", "DPO", "KTO", "PPO", "OnlineDPO")
            for w in ("lora", "full")
        ),
        *("PPO-lora-zero1", "OnlineDPO-full-zero1", "DPO-nf4-zero2", "RewardModel-full-zero1"),
        *(
            "OnlineDPO-lora-zero2-follow",
            "OnlineDPO-full-zero2-follow",
            "PPO-full-zero2-bf16_mixed",
            "DPO-nf4-zero2-bf16_true",
            "RewardModel-full-zero2-token",
        ),
    }
)
ALONE = ("PPO-lora-zero2", "SFT-full-zero1", "OnlineDPO-full-zero2")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def single(llama_dir, place):
    return Runs(llama_dir, place)


@pytest.fixture(scope="module")
def two(llama_dir, place):
    return launch(["zero", *CELLS], llama_dir, place / "two")


@pytest.fixture(scope="module")
def alone(llama_dir, place):
    (place / "one").mkdir()
    run_module("tests.strategies.worker", 1, llama_dir, place / "one", *ALONE, seconds=600)
    return {name: [torch.load(place / "one" / f"{name}.0", weights_only=True)] for name in ALONE}


@pytest.mark.parametrize("name", CELLS)
def test_two_processes_equal_one_and_resume(name, two, single, place, tmp_path):
    check(name, two[name], single)
    if "bf16" in name:  # one process is in float32
        exported(place / "two" / name / "epoch=1.ckpt", tmp_path)
    else:
        check_export(name, place / "two", single, tmp_path)


@pytest.mark.parametrize("name", ALONE)
def test_one_process_equals_one_without_it(name, alone, single, place, tmp_path):
    check(name, alone[name], single)
    check_export(name, place / "one", single, tmp_path)


def test_a_step_is_the_mean_over_its_micro_batches_however_they_are_cut(two, llama_dir):
    expected = accumulated(llama_dir)
    for rank in two["zero"]:
        for moved in rank["accumulated"]:
            assert (moved - expected).norm() < 1e-5 * expected.norm()


def test_in_stage_1_ranks_may_have_other_numbers_of_micro_batches(two):
    for rank in two["zero"]:
        whole, cut = rank["by tokens"]
        assert (whole - cut).norm() < 1e-5 * whole.norm()
    assert two["zero"][0]["micro-batches"] != two["zero"][1]["micro-batches"]


def test_validation_alone(two, llama_dir):
    expected = pytest.approx(validated(llama_dir), rel=1e-5)
    assert [rank["validated"] for rank in two["zero"]] == [expected, expected]


def test_gradients_are_clipped(two):
    for rank in two["zero"]:
        sft, ppo, free = rank["clipped"]
        assert sft == pytest.approx(SGD.lr * CLIP, rel=1e-3)
        assert ppo == pytest.approx(SGD.lr * CLIP, rel=1e-3)
        assert free > 2 * SGD.lr * CLIP


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("stage 3", "ZeRO stage is 3.*Set stage: 2.*fsdp2.yaml"),
        ("no ZeRO", "ZeRO stage is 0.*Set stage: 2"),
        ("window", "3 batches, no multiple of accumulate_grad_batches 2.*limit_train_batches"),
        ("reference", "stored as bfloat16.*set reference.quantization.compute_dtype: float32"),
        ("tokens", "update.micro_batch_tokens is 64.*Set it to null"),
        ("nan", "the loss is nan at step 0, on rows .*no weight was changed"),
    ],
)
def test_what_cannot_work_is_refused(case, message, two):
    for rank in two["zero"]:
        assert re.search(message, rank["refused"][case], re.DOTALL)
