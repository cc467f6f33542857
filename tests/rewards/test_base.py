"""The checked call: what it lets through, and what it says of everything else."""

import pytest
import torch
from torch import nn

from lightning_rlhf.rewards import Reward, RewardError, RewardResult, Samples, score
from tests.rewards.conftest import Fixed, samples_of


def test_a_reward_is_one_part_of_itself(samples):
    result = score(Fixed([1, 2, 3], name="mine"), samples)
    assert result.total.dtype == torch.float32
    assert result.total.tolist() == [1.0, 2.0, 3.0]
    assert list(result.parts) == ["mine"]
    assert Fixed([1]).name == "fixed"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, 2.0], r"'fixed' returned values of shape \(2,\) for 3 samples"),
        ([[1.0], [2.0], [3.0]], r"shape \(3, 1\)"),
        (
            [1.0, float("nan"), float("inf")],
            "'fixed' is nan for sample 1 .2 of 3 .* 'prompt 1' .* 'answer 1'",
        ),
        ([1.0, 1.0, float("-inf")], "is -inf for sample 2 .1 of 3"),
        ("three", "'fixed' returned a str, and must return a tensor"),
    ],
)
def test_what_is_no_reward_is_refused(values, said, samples):
    with pytest.raises(RewardError, match=said):
        score(Fixed(values), samples)


def test_a_reward_that_raises_is_named_and_its_error_kept(samples):
    class Broken(Reward):
        def forward(self, samples):
            return {}["key"]

    with pytest.raises(RewardError, match="the reward 'broken' failed: KeyError: 'key'") as caught:
        score(Broken(), samples)
    assert isinstance(caught.value.__cause__, KeyError)


def test_parts_are_checked_too(samples):
    bad = RewardResult(torch.zeros(3), {"inner": torch.tensor([0.0, 0.0, float("nan")])})
    with pytest.raises(RewardError, match="'inner' is nan for sample 2"):
        score(Fixed(bad), samples)


def test_long_prompts_are_shown_by_their_start():
    long = Samples(["x" * 999], ["y"], [[1]], [[2]], [False])
    with pytest.raises(RewardError) as caught:
        score(Fixed([float("nan")]), long)
    assert "x" * 60 + "…" in str(caught.value)
    assert len(str(caught.value)) < 250


def test_samples_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="truncated has 2 values for 1 prompts"):
        Samples(["a"], ["b"], [[1]], [[2]], [False, False])
    with pytest.raises(ValueError, match=r"columns\['answer'\] has 1 values for 2 prompts"):
        samples_of(2, answer=["x"])


def test_samples_are_selected_with_their_columns():
    chosen = samples_of(3, answer=["a", "b", "c"]).select([2, 0])
    assert chosen.columns == {"answer": ["c", "a"]}
    assert chosen.lengths.tolist() == [3, 1]
    assert chosen.truncated == [True, False]


def test_a_held_model_moves_along_and_is_in_no_checkpoint(samples):
    class Held(Reward):
        def __init__(self):
            super().__init__()
            self.model = (nn.Linear(1, 1),)
            self.hold(self.model[0])

    module = nn.Module()
    module.reward = Held()
    module.to(torch.float64).train()
    (model,) = module.reward.model
    assert model.weight.dtype == torch.float64
    assert not model.training
    assert not model.weight.requires_grad
    assert not list(module.parameters())
    assert not module.state_dict()


def test_scores_have_no_gradient(samples):
    assert not score(Fixed(torch.ones(3, requires_grad=True)), samples).total.requires_grad
