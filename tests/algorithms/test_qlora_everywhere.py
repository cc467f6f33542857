"""Every algorithm on a base in nf4 with the optimizer that is paged on a GPU."""

import weakref

import bitsandbytes as bnb
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DynamicCache

from lightning_rlhf.algorithms import DPO, KTO, PPO, SFT, OnlineDPO, Optimization, RewardModel, Update
from lightning_rlhf.data.packing import pack
from lightning_rlhf.generation import Sampling, generate
from lightning_rlhf.models import LanguageModel, LoRA, Policy, Quantization
from tests.algorithms.conftest import labelled, random_groups
from tests.algorithms.rollouts import Waves, prompts

SAMPLES = {"reward": Waves(), "sampling": Sampling(max_new_tokens=4, num_samples=2)}
MODULES = {
    "SFT": (SFT, {}, random_groups(4, 1)),
    "DPO": (DPO, {}, random_groups(4, 2)),
    "KTO": (KTO, {}, labelled(4)),
    "RewardModel": (RewardModel, {}, random_groups(4, 2)),
    "PPO": (PPO, {**SAMPLES, "update": Update(num_epochs=1, minibatch_size=4)}, None),
    "OnlineDPO": (OnlineDPO, SAMPLES, None),
}


@pytest.mark.parametrize("kind", [True, "selective"])
@pytest.mark.parametrize("name", MODULES)
def test_one_step_moves_every_adapter_and_no_base(name, kind, llama_dir, trainer):
    cls, settings, groups = MODULES[name]
    policy = Policy(
        llama_dir,
        lora=LoRA(r=2),
        quantization=Quantization(compute_dtype="float32"),
        gradient_checkpointing=kind,
    )
    optimization = Optimization(name="paged_adamw_8bit", lr=1e-2, schedule="constant", warmup_ratio=0.0)
    module = cls(policy, optimization=optimization, **settings)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    loader = prompts() if groups is None else DataLoader(groups, batch_size=4, collate_fn=pack)
    run = trainer(max_epochs=1)
    run.fit(module, loader)
    assert isinstance(run.optimizers[0], bnb.optim.PagedAdamW8bit)
    moved = {n for n, p in module.named_parameters() if not same(p.detach(), before[n])}
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert moved <= trained
    # B is 0 at the start, and A has no gradient before B has moved; of the critic the head starts at 0 as well.
    assert {n for n in trained if ".lora_B.default" in n} <= moved
    assert any(type(p) is bnb.nn.Params4bit for p in module.parameters())


def same(one, other):
    """By bytes: packed weights, seen as numbers, hold nan."""
    flat = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_cache_is_gone_before_the_update(num_samples, llama, tokenizer, monkeypatch):
    caches = []

    class Watched(DynamicCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(weakref.ref(self))

    monkeypatch.setattr("lightning_rlhf.generation.prefill.DynamicCache", Watched)
    monkeypatch.setattr("transformers.generation.utils.DynamicCache", Watched)
    sampling = Sampling(max_new_tokens=4, num_samples=num_samples)
    list(generate(LanguageModel(llama), tokenizer, [[5, 6, 7], [8]], sampling, seeds=[0, 1]))
    assert caches
    assert all(reference() is None for reference in caches)
