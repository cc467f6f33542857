"""The monitors' numbers are those of one process on two, and survive a resume of two."""

import json

import pytest
import torch

from lightning_rlhf.cli.run_logs import read_curves
from tests.callbacks.monitors_worker import PROMPTS, main
from tests.processes import fork


@pytest.fixture(scope="module")
def folders(llama_dir, tmp_path_factory):
    """What one process wrote, and what two did."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main(llama_dir, 1, one)
    torch.set_num_threads(threads)
    fork(main, llama_dir, 2, two, world=2)
    return one, two


def kept(folder, name, rank=0):
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def test_two_processes_log_what_one_does(folders):
    one, two = (read_curves([folder / "whole/version_0"])[0] for folder in folders)
    one, two = ({n: c for n, c in run.items() if n != "goodhart/time_share"} for run in (one, two))
    names = {name for name in one if name.startswith(("goodhart/", "hacking/"))}
    assert {name for name in two if name.startswith(("goodhart/", "hacking/"))} == names
    assert {"goodhart/gold", "goodhart/gap_lower", "hacking/refusals", "hacking/disagreement"} <= names
    for name in names:
        assert two[name].steps == one[name].steps, name
        assert two[name].values == pytest.approx(one[name].values, rel=1e-3, abs=1e-5, nan_ok=True), name
    assert one["goodhart/kl"].steps == [0, 1, 2]
    assert min(one["goodhart/kl"].values[1:]) > 1e-3  # there is something to measure


def test_the_samples_are_the_same_and_every_rank_has_them_all(folders):
    one, *ranks = kept(folders[0], "whole"), kept(folders[1], "whole", 0), kept(folders[1], "whole", 1)
    for rank in ranks:
        assert [evaluation["rows"] for evaluation in rank["goodhart"]] == [list(range(PROMPTS))] * 3
        for ours, theirs in zip(rank["goodhart"], one["goodhart"], strict=True):
            assert ours["completions"] == theirs["completions"]
            assert ours["gold"] == theirs["gold"]
            assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3, abs=1e-5)
        assert rank["control"]["held_out"] == one["control"]["held_out"]
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_has_the_same_history_exactly(folders, world):
    whole, resumed = (kept(folders[world - 1], name) for name in ("whole", "resumed"))
    assert resumed == whole


def test_rollouts_of_both_ranks_are_judged_together(folders):
    one, *ranks = kept(folders[0], "online"), kept(folders[1], "online", 0), kept(folders[1], "online", 1)
    assert ranks[0] == ranks[1]
    assert [len(evaluation["rows"]) for evaluation in one] == [PROMPTS, 8, 8]
    for ours, theirs in zip(ranks[0], one, strict=True):
        mine, expected = (
            sorted(zip(*(evaluation[name] for name in ("rows", "gold", "proxy", "kl")), strict=True))
            for evaluation in (ours, theirs)
        )
        assert torch.allclose(torch.tensor(mine), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    assert ranks[0][2]["gold"] != ranks[0][1]["gold"]  # something was learnt, or drawn, in between
