import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("datamodule", ["SFTDataModule", "PromptDataModule"])
def test_two_processes_share_the_rows(tmp_path, datamodule):
    rows = [{"prompt": "the sky", "completion": " is" * (1 + i % 7)} for i in range(41)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        "timeout",
        "-k",
        "5",
        "120",
        sys.executable,
        str(ROOT / "tests/data/ddp_worker.py"),
        str(tmp_path),
        datamodule,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for split in ("train", "val", "predict"):
        assert len(one[split]) == len(two[split]) or split == "predict"
        assert sorted(row for batch in one[split] + two[split] for row in batch) == list(range(41))
    assert done.stderr.count("train: 41 rows read") == 1
