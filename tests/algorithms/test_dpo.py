import math

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, Optimization
from lightning_rlhf.data.packing import pack
from lightning_rlhf.models import LoRA, Policy
from tests.algorithms.conftest import random_groups
from tests.models.families import tiny


def loader(k=2, count=8):
    return DataLoader(random_groups(count, k), batch_size=4, collate_fn=pack)


def test_inside_a_stock_trainer(trainer, tokenizer, llama):
    module = DPO(llama, tokenizer, optimization=Optimization(lr=1e-2))
    run = trainer(max_epochs=6)
    run.fit(module, loader(), loader())
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    names += ("logps/chosen", "logps/rejected", "mean_token_accuracy", "entropy")
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in names} <= set(run.callback_metrics)
    assert run.callback_metrics["train/rewards/accuracies"] == 1
    (validated,) = run.validate(module, loader(), verbose=False)
    (tested,) = run.test(module, loader(), verbose=False)
    assert {n.removeprefix("test/"): v for n, v in tested.items()} == {
        n.removeprefix("val/"): v for n, v in validated.items()
    }
    rewards = torch.cat(run.predict(module, loader()))
    margins = rewards[0::2] - rewards[1::2]
    assert margins.mean().item() == pytest.approx(validated["val/rewards/margins"], rel=1e-5)


def test_validation_does_not_change_training(trainer, llama_dir):
    losses = []
    for val in (None, loader()):
        torch.manual_seed(0)
        module = DPO(Policy(llama_dir, lora=LoRA(r=2)), optimization=Optimization(lr=1e-2))
        run = trainer(max_epochs=3, num_sanity_val_steps=0)
        run.fit(module, loader(), val)
        losses.append(run.callback_metrics["train/loss"].item())
    assert losses[0] == losses[1]


def test_a_reference_that_is_not_the_policy_stops_the_run(trainer, tokenizer, llama):
    module = DPO(llama, tokenizer)
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="at step 0 policy and reference differ by .* nats a token"):
        trainer().fit(module, loader())


def test_another_model_as_reference_is_allowed(trainer, tokenizer, llama_dir):
    module = DPO(tiny("LlamaConfig", seed=5), tokenizer, reference=llama_dir)
    run = trainer(max_steps=1)
    run.fit(module, loader())
    assert module.reference.kind == "model"
    assert run.callback_metrics["train/loss"].item() != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("k", [1, 3])
def test_other_than_two_completions_is_refused(k, trainer, tokenizer, llama):
    with pytest.raises(ValueError, match=f"row 0: DPO needs two completions a prompt .* got {k}"):
        trainer().fit(DPO(llama, tokenizer), loader(k))


def test_precomputing_without_a_datamodule_is_refused(trainer, tokenizer, llama, tmp_path):
    module = DPO(llama, tokenizer, precompute_reference=True, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="precompute_reference needs the data by a datamodule"):
        trainer().fit(module, loader())


def test_a_built_model_needs_its_tokenizer(llama):
    with pytest.raises(ValueError, match="needs its tokenizer"):
        DPO(llama)


def test_a_policy_of_the_wrong_type_is_refused(tokenizer):
    with pytest.raises(TypeError, match="policy must be a path, Policy settings or a built model, got int"):
        DPO(3, tokenizer)
