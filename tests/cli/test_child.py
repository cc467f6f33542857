import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
CHILD = """
import os, threading, time
from lightning_rlhf.cli import child
threading.Thread(target=child.follow, args=(os.getppid(),), daemon=True).start()
print("ready", flush=True)
time.sleep(30)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_a_child_ends_when_its_parent_is_killed():
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        parent.wait()
        began = time.monotonic()
        parent.stdout.read()  # comes back when nobody is left to write
        assert time.monotonic() - began < 15


def test_it_is_the_program():
    command = [sys.executable, "-m", "lightning_rlhf.cli.child"]
    found = subprocess.run(
        [*command, "nothing"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "no command 'nothing'" in found.stderr
