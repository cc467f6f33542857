"""Functions written for TRL work unchanged, coroutines run together, and whatever is wrong is said."""

import asyncio
import sys
import threading

import numpy as np
import pytest
import torch

from lightning_rlhf.rewards import FunctionReward, RewardError, Samples, WeightedReward, score
from lightning_rlhf.rewards.functions import load_function
from tests.rewards.conftest import samples_of


def test_what_a_function_is_given():
    seen = {}

    def everything(**kwargs):
        seen.update(kwargs)
        return [0.0, 1.0]

    samples = samples_of(2, answer=["a", "b"])
    result = score(FunctionReward(everything), samples)
    assert result.parts["everything"].tolist() == [0.0, 1.0]
    assert seen == {
        "prompts": ["prompt 0", "prompt 1"],
        "completions": ["answer 0", "answer 1"],
        "completion_ids": [[20], [21, 21]],
        "prompt_ids": [[10], [11]],
        "truncated": [False, True],
        "answer": ["a", "b"],
    }


def test_completions_of_conversations_are_messages():
    chat = [{"role": "user", "content": "Hi"}]
    samples = Samples([chat], ["Yo"], [[5]], [[6]], [False])
    reward = FunctionReward(lambda completions: [len(c[0]["content"]) for c in completions], name="length")
    assert score(reward, samples).total.tolist() == [2.0]


def test_trls_own_reward_functions(samples):
    trl_rewards = pytest.importorskip("trl.rewards")
    completion_ids = [[1, 2, 3, 4], [5] * 5, [7] * 9]
    samples = Samples(["x"] * 3, ["y"] * 3, [[1]] * 3, completion_ids, [False] * 3)
    for function in (
        trl_rewards.get_soft_overlong_punishment(8, 4),
        trl_rewards.get_repetition_penalty_reward(2, -1.0),
    ):
        expected = function(completion_ids=completion_ids)
        assert len(set(expected)) > 1
        assert score(FunctionReward(function), samples).total.tolist() == pytest.approx(expected)


def test_arrays_and_tensors_are_taken(samples):
    for values in (
        np.array([1.0, 2.0, 3.0]),
        torch.tensor([1, 2, 3]),
        (1, 2, 3),
        iter([1, 2, np.float32(3)]),
    ):
        reward = FunctionReward(lambda completions, v=values: v, name="f")
        assert score(reward, samples).total.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], r"'f' returned values of shape \(1,\) for 3 samples"),
        (1.0, "'f' failed: TypeError: it returned a float, and must return a list"),
        ("abc", "it returned a str"),
        ([1.0, float("nan"), 1.0], "'f' is nan for sample 1"),
        (
            [1.0, None, None],
            "it returned None for 2 of 3 samples, first .* 'prompt 1': return a number, or say",
        ),
        ([1.0, "two", 3.0], "'f' failed: ValueError: could not convert string to float"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(returned, said, samples):
    with pytest.raises(RewardError, match=said):
        score(FunctionReward(lambda completions: returned, name="f"), samples)


def test_none_can_stand_for_a_number(samples):
    reward = FunctionReward(lambda completions: [1.0, None, 2.0], name="f", none_value=0.0)
    assert score(reward, samples).total.tolist() == [1.0, 0.0, 2.0]


def test_a_column_that_is_not_there(samples):
    def exact(completions, answer, tolerance=0.1):
        return [0.0] * len(completions)

    with pytest.raises(
        RewardError, match="'exact' failed: ValueError: it needs 'answer', which is not among"
    ):
        score(FunctionReward(exact), samples)
    with pytest.raises(RewardError, match="the data has a column 'truncated', which is an argument"):
        score(FunctionReward(exact), samples_of(3, answer=["a"] * 3, truncated=["b"] * 3))
    score(FunctionReward(exact), samples_of(3, answer=["a"] * 3))


def test_coroutines_of_several_rewards_run_together(samples):
    """Each waits for the other: one after the other they would never end."""
    one, two = asyncio.Event(), asyncio.Event()

    async def first(completions):
        one.set()
        await asyncio.wait_for(two.wait(), 20)
        return [1.0] * len(completions)

    class Second:
        async def __call__(self, completions, **kwargs):
            two.set()
            await asyncio.wait_for(one.wait(), 20)
            return [2.0] * len(completions)

    def plain(completions):
        return [4.0] * len(completions)

    functions = {"first": first, "plain": plain, "second": Second()}
    total = score(WeightedReward({n: FunctionReward(f) for n, f in functions.items()}), samples).total
    assert total.tolist() == [7.0] * 3
    assert FunctionReward(Second()).name == "Second"


def test_a_coroutine_where_a_loop_is_running_already(samples):
    async def late(completions):
        await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    async def notebook():
        return score(FunctionReward(late), samples).total.tolist()

    assert asyncio.run(notebook()) == [1.0] * 3


def test_coroutines_stay_in_one_loop(samples):
    """A client that was opened in one call must work in the next."""
    seen = []

    async def where(completions):
        seen.append((asyncio.get_running_loop(), threading.current_thread().name))
        return [0.0] * len(completions)

    reward = FunctionReward(where)
    score(reward, samples)
    score(reward, samples)
    assert seen[0] == seen[1]


def test_a_coroutine_that_raises(samples):
    async def broken(completions):
        raise RuntimeError("no judge today")

    with pytest.raises(RewardError, match="'broken' failed: RuntimeError: no judge today"):
        score(FunctionReward(broken), samples)


def test_functions_of_files_and_modules(tmp_path, monkeypatch, samples):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, value in ((one, 1.0), (two, 2.0)):
        folder.mkdir()
        (folder / "rewards.py").write_text(
            f"from dataclasses import dataclass\n\n@dataclass\nclass X:\n    v: float = {value}\n\n"
            "def fn(completions):\n    return [X().v] * len(completions)\n"
        )
    values = [score(FunctionReward(f"{folder}/rewards.py:fn"), samples).total[0] for folder in (one, two)]
    assert values == [1.0, 2.0]
    monkeypatch.chdir(one)
    assert FunctionReward("rewards.py:fn").name == "fn"
    assert load_function("math:sqrt")(4.0) == 2.0


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("fn", "'fn' names no function: write package.module:function"),
        (":fn", "names no function"),
        ("nowhere.py:fn", "no file 'nowhere.py' .from "),
        ("no_such_package.rewards:fn", "no module 'no_such_package.rewards' to import"),
        ("math:squareroot", "math has no function 'squareroot'; it has .*sqrt"),
        ("math:pi", "math has no function 'pi'"),
    ],
)
def test_functions_that_are_not_there(where, said):
    with pytest.raises(ValueError, match=said):
        FunctionReward(where)


def test_a_module_that_lacks_something_itself_says_so(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_dependency\n")
    before = set(sys.modules)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        FunctionReward(f"{broken}:fn")
    assert set(sys.modules) == before
