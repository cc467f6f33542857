"""Two processes that Lightning starts, as it does where a user gives ``devices=2``."""

import json

import pytest

from tests.processes import run_module

DATAMODULES = ("SFTDataModule", "PromptDataModule")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of what both ranks saw, and what they printed."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"prompt": "the sky", "completion": " is" * (1 + i % 7)} for i in range(41)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, run_module("tests.data.ddp_worker", folder, *DATAMODULES, seconds=300)


@pytest.mark.parametrize("datamodule", DATAMODULES)
def test_two_processes_share_the_rows(trained, datamodule):
    folder, _ = trained
    one, two = (json.loads((folder / f"{datamodule}.{rank}.json").read_text()) for rank in (0, 1))
    for split in ("train", "val", "predict"):
        assert len(one[split]) == len(two[split]) or split == "predict"
        assert sorted(row for batch in one[split] + two[split] for row in batch) == list(range(41))


def test_one_process_says_what_was_read(trained):
    assert trained[1].count("train: 41 rows read") == len(DATAMODULES)
