import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.families import tiny
from tests.tokenizers import letters

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = ["timeout", "-k", "5", "200", sys.executable, "-m", "tests.callbacks.resume_worker", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def losses(path):
    return [tuple(map(str, json.loads(line))) for line in Path(f"{path}.losses").read_text().splitlines()]


@pytest.mark.parametrize(("algorithm", "workers"), [("SFT", "0"), ("SFT", "2"), ("DPO", "0")])
def test_killed_in_mid_epoch_and_resumed_equals_uninterrupted(algorithm, workers, tmp_path):
    """30 rows, batches of 4, 8 steps an epoch: killed at step 14, resumed from the checkpoint at step 12."""
    draw = random.Random(0)
    word = lambda: "".join(draw.choices("abcdefgh ", k=draw.randint(2, 12))) + "x"  # noqa: E731
    columns = ("prompt", "completion") if algorithm == "SFT" else ("prompt", "chosen", "rejected")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({c: word() for c in columns}) + "\n" for _ in range(30)))
    tiny("LlamaConfig").save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    common = (algorithm, str(tmp_path / "model"), str(data))

    whole = run(*common, str(tmp_path / "whole"), workers, "-1")
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = run(*common, str(tmp_path / "killed"), workers, "14")
    assert killed.returncode != 0
    assert not (tmp_path / "killed.weights").exists()
    (checkpoint,) = (tmp_path / "killed.checkpoints").glob("*step=12.ckpt")
    resumed = run(*common, str(tmp_path / "resumed"), workers, "-1", str(checkpoint))
    assert resumed.returncode == 0, resumed.stderr[-3000:]

    expected = losses(tmp_path / "whole")
    assert len(expected) == 24
    assert losses(tmp_path / "killed") == expected[:14]
    assert losses(tmp_path / "resumed") == expected[12:]
    final, again = (torch.load(tmp_path / f"{n}.weights", weights_only=True) for n in ("whole", "resumed"))
    assert all(torch.equal(final[name], again[name]) for name in final)
