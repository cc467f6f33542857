"""PPO that is killed and resumed, and PPO in two processes."""

import json
import random
from functools import partial

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from tests.algorithms.ppo_worker import PER_ROLLOUT, ROLLOUTS, parallel, train
from tests.processes import fork


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_killed_inside_a_rollout_and_resumed_equals_uninterrupted(llama_dir, tmp_path):
    """12 rows, batches of 4: 3 rollouts an epoch. Killed at step 6 of 24, resumed in mid-epoch from step 4."""
    draw = random.Random(0)
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": "".join(draw.choices("abcdef ", k=5)) + "x"}) + "\n" for _ in range(12))
    )
    module, expected = train(llama_dir, str(data), tmp_path / "whole")
    assert [step for step, *_ in expected] == [PER_ROLLOUT * (i + 1) for i in range(ROLLOUTS)]
    assert len({coef for _, _, coef, _ in expected}) == ROLLOUTS  # it moves every time
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        fork(partial(train, kill_at=6), llama_dir, str(data), tmp_path / "killed")
    assert [path.name for path in (tmp_path / "killed").glob("*")] == ["step=4.ckpt"]
    again, resumed = train(
        llama_dir, str(data), tmp_path / "resumed", ckpt=tmp_path / "killed" / "step=4.ckpt"
    )
    assert resumed == expected[1:]
    weights = dict(again.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in module.named_parameters())
    assert again.kl.coef == module.kl.coef


@pytest.mark.usefixtures("one_thread")
def test_two_processes_equal_one_with_twice_the_batch(llama_dir, tmp_path):
    parallel(llama_dir, 1, str(tmp_path / "one"))
    fork(parallel, llama_dir, 2, str(tmp_path / "two"), world=2)
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.0", "two.0", "two.1"))
    assert len(one["gradients"]) == 6
    for rank in two:
        for a, b in zip(one["gradients"], rank["gradients"], strict=True):
            assert (a - b).norm() / a.norm() < 1e-4
        assert rank["coef"] == two[0]["coef"] == pytest.approx(one["coef"], rel=1e-5)
        assert rank["metrics"] == two[0]["metrics"]
    roles = {role for name in one["weights"] for role in ("default", "value", "critic.head") if role in name}
    assert roles == {"default", "value", "critic.head"}
    for name, weight in one["weights"].items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), name
        torch.testing.assert_close(two[0]["weights"][name], weight, rtol=1e-4, atol=1e-6)
    assert two[0]["metrics"].keys() == one["metrics"].keys()
    for name, value in one["metrics"].items():
        assert two[0]["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
