import json
import random
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from tests.callbacks.resume_worker import main
from tests.models.families import tiny
from tests.processes import fork
from tests.tokenizers import letters


def losses(path):
    return [tuple(map(str, json.loads(line))) for line in Path(f"{path}.losses").read_text().splitlines()]


@pytest.mark.parametrize(("algorithm", "workers"), [("SFT", 0), ("SFT", 2), ("DPO", 0)])
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

    fork(main, *common, str(tmp_path / "whole"), workers, -1)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        fork(main, *common, str(tmp_path / "killed"), workers, 14)
    assert not (tmp_path / "killed.weights").exists()
    (checkpoint,) = (tmp_path / "killed.checkpoints").glob("*step=12.ckpt")
    fork(main, *common, str(tmp_path / "resumed"), workers, -1, str(checkpoint))

    expected = losses(tmp_path / "whole")
    assert len(expected) == 24
    assert losses(tmp_path / "killed") == expected[:14]
    assert losses(tmp_path / "resumed") == expected[12:]
    final, again = (torch.load(tmp_path / f"{n}.weights", weights_only=True) for n in ("whole", "resumed"))
    assert all(torch.equal(final[name], again[name]) for name in final)
