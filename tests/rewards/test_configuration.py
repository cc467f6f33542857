"""Rewards as YAML spells them, by short class names."""

import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf.models import Aggregation, Policy
from lightning_rlhf.rewards import (
    Clip,
    EndpointReward,
    FunctionReward,
    Reward,
    RewardEnsemble,
    RewardModelReward,
    ShapedReward,
    WeightedReward,
    score,
)
from tests.rewards.conftest import samples_of

YAML = """
reward:
  class_path: ShapedReward
  init_args:
    reward:
      class_path: WeightedReward
      init_args:
        rewards:
          model:
            class_path: RewardModelReward
            init_args: {{model: {path}, batch_size: 4}}
          settings:
            class_path: RewardModelReward
            init_args: {{model: {{path: {path}, dtype: bfloat16}}}}
          members:
            class_path: RewardEnsemble
            init_args:
              members:
                - {path}
                - class_path: RewardModelReward
                  init_args: {{model: {path}}}
              aggregation: {{how: worst_case}}
          rule:
            class_path: FunctionReward
            init_args: {{function: "tests.rewards.test_configuration:rule", none_value: 0.0}}
          served:
            class_path: EndpointReward
            init_args: {{url: "http://localhost:1"}}
        weights: {{rule: 0.5, served: 0.0}}
    shapers:
      - class_path: Clip
        init_args: {{low: -5, high: 5}}
      - class_path: Normalized
"""


def rule(completions):
    return [1.0, None, 2.0]


@pytest.fixture(scope="module")
def classifier_dir(llama_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    model = AutoModelForSequenceClassification.from_pretrained(llama_dir, num_labels=1)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(path)
    return str(path)


def test_rewards_are_configured_by_short_names(classifier_dir, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--reward", type=Reward)
    (tmp_path / "reward.yaml").write_text(YAML.format(path=classifier_dir))
    config = parser.parse_args(["--config", str(tmp_path / "reward.yaml")])
    reward = parser.instantiate(config).reward
    assert isinstance(reward, ShapedReward)
    assert isinstance(reward.shapers[0], Clip)
    assert isinstance(reward.reward, WeightedReward)
    model, settings, ensemble, function, served = reward.reward.rewards
    assert isinstance(model, RewardModelReward)
    assert model.batch_size == 4
    assert next(settings.language_model.parameters()).dtype == torch.bfloat16
    assert isinstance(ensemble, RewardEnsemble)
    assert ensemble.aggregation == Aggregation("worst_case")
    assert isinstance(served, EndpointReward)
    assert isinstance(function, FunctionReward)
    assert score(function, samples_of(3)).parts["rule"].tolist() == [1.0, 0.0, 2.0]


def test_settings_as_objects(classifier_dir):
    reward = RewardModelReward(Policy(classifier_dir, dtype="bfloat16"))
    assert next(reward.language_model.parameters()).dtype == torch.bfloat16
    moved = torch.nn.Sequential(reward).to(torch.float64)
    assert next(moved[0].language_model.parameters()).dtype == torch.float64
