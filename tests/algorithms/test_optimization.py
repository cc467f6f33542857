"""Learning rates by parameter: LoRA+ beside PEFT's own groups, and steps that the ratio shows in."""

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from lightning_rlhf.algorithms import Optimization
from lightning_rlhf.algorithms.optimization import build_optimizer
from lightning_rlhf.models import LoRA, Policy, load_language_model


@pytest.fixture
def model(llama_dir):
    torch.manual_seed(0)
    return load_language_model(Policy(llama_dir, lora=LoRA(r=2)))


def rates(optimizer, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_lora_plus_gives_every_parameter_the_rate_that_peft_gives_it(model):
    ours = build_optimizer(model.named_parameters(), Optimization(lr=1e-3, lora_plus_ratio=16.0))
    theirs = create_loraplus_optimizer(model.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    trained = rates(ours, model)
    assert trained == {name: lr for name, lr in rates(theirs, model).items() if name in trained}
    assert set(trained.values()) == {1e-3, 16e-3}
    assert all((lr == 16e-3) == (".lora_B." in name) for name, lr in trained.items())


def test_the_ratio_multiplies_the_rate_of_a_role(model):
    optimizer = build_optimizer(
        model.named_parameters(), Optimization(lr=1e-3, lora_plus_ratio=4.0), lambda name: 5e-4
    )
    assert set(rates(optimizer, model).values()) == {5e-4, 2e-3}


def test_without_it_there_is_one_rate(model):
    assert set(rates(build_optimizer(model.named_parameters(), Optimization(lr=1e-3)), model).values()) == {
        1e-3
    }


def test_a_ratio_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="optimization.lora_plus_ratio must be positive, got 0"):
        Optimization(lora_plus_ratio=0.0)
