"""Python in a process of its own, as the tests of two processes start it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_module(*words, seconds):
    """``python -m`` these words, under ``timeout -k``: a hang between two processes does not end on SIGTERM."""
    done = subprocess.run(
        ["timeout", "-k", "5", str(seconds), sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
