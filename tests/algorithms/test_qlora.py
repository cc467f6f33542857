"""A base in 4 bits from training to export. Everything here runs on the CPU and, where there is one, on a GPU."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightning_rlhf.models.export import export_checkpoint
from lightning_rlhf.models.loading import bitsandbytes_config, keep_gradients_on_cpu
from tests.algorithms.qlora_worker import NF4, SAVE_EVERY, STEPS, train

ROOT = Path(__file__).parents[2]
KILLED_AT = 14
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Bit for bit on the CPU; kernels of a GPU may add in another order.
TOLERANCE = {"cpu": 0.0, "cuda": 2e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """32 rows of each kind; every chosen answer ends in another letter than the rejected one."""
    draw = random.Random(0)
    word = lambda: "".join(draw.choices("abcdefgh", k=draw.randint(2, 8)))  # noqa: E731
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "prompt": word() + " ",
            "completion": word() + "xx",
            "chosen": word() + "yes",
            "rejected": word() + "no",
        }
        for _ in range(32)
    ]
    for name, columns in {
        "SFT": ("prompt", "completion"),
        "DPO": ("prompt", "chosen", "rejected"),
    }.items():
        lines = (json.dumps({column: row[column] for column in columns}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module", params=["SFT", "DPO"])
def algorithm(request):
    return request.param


@pytest.fixture(scope="module", params=DEVICES)
def trained(request, algorithm, data, llama_dir, tmp_path_factory):
    """An uninterrupted run: its device, module, losses and folder of checkpoints."""
    folder = tmp_path_factory.mktemp(f"{algorithm}-{request.param}")
    module, losses = train(algorithm, llama_dir, str(data / f"{algorithm}.jsonl"), folder, request.param)
    return request.param, module, losses, folder


def test_the_loss_falls(trained, algorithm):
    device, module, losses, _ = trained
    assert list(losses) == list(range(1, STEPS + 1))
    first, last = (
        sum(losses[step] for step in steps) / 4 for steps in (range(1, 5), range(STEPS - 3, STEPS + 1))
    )
    assert last < (0.85 if algorithm == "SFT" else 0.5) * first
    parameters = dict(module.policy.named_parameters())
    assert {p.dtype for p in parameters.values() if p.requires_grad} == {torch.float32}
    assert any(type(p).__name__ == "Params4bit" for p in parameters.values())


def test_killed_and_resumed_gives_the_losses_of_an_uninterrupted_run(
    trained, algorithm, data, llama_dir, tmp_path
):
    device, _, losses, _ = trained
    path = str(data / f"{algorithm}.jsonl")
    arguments = [
        algorithm,
        llama_dir,
        path,
        str(tmp_path),
        device,
        str(KILLED_AT),
        str(torch.get_num_threads()),
    ]
    command = ["timeout", "-k", "5", "200", sys.executable, "-m", "tests.algorithms.qlora_worker", *arguments]
    killed = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr[-3000:]
    checkpoints = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    last = KILLED_AT // SAVE_EVERY * SAVE_EVERY
    assert f"step={last}.ckpt" in checkpoints
    assert f"step={last + SAVE_EVERY}.ckpt" not in checkpoints
    _, resumed = train(algorithm, llama_dir, path, tmp_path, device, ckpt=tmp_path / f"step={last}.ckpt")
    expected = {step: loss for step, loss in losses.items() if step > last}
    assert resumed == pytest.approx(expected, rel=TOLERANCE[device], abs=0.0)


@torch.no_grad()
def logits(model):
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]], device=model.device)
    return model.eval()(input_ids=ids).logits.float().cpu()


def gap(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_adapter_and_merged_model_load_with_equal_logits(trained, llama_dir, tmp_path):
    device, module, _, folder = trained
    checkpoint = folder / f"step={STEPS}.ckpt"
    export_checkpoint(checkpoint, tmp_path / "adapter")
    export_checkpoint(checkpoint, tmp_path / "merged", merge=True)

    def base(**settings):
        model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16, **settings)
        keep_gradients_on_cpu(model)  # else bitsandbytes swaps kernels on some processors
        return model.to(device)

    untrained = logits(base(quantization_config=bitsandbytes_config(NF4)))
    adapted = PeftModel.from_pretrained(
        base(quantization_config=bitsandbytes_config(NF4)), tmp_path / "adapter"
    )
    expected = logits(module.policy.model.to(device))
    assert gap(untrained, expected) > 0.1
    assert gap(logits(adapted), expected) < 1e-3
    on_half = logits(PeftModel.from_pretrained(base(), tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").to(device)
    assert merged.dtype == torch.bfloat16
    assert gap(logits(merged), on_half) < 0.02  # the sum W + BA is rounded to bfloat16
