import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, Optimization
from lightning_rlhf.callbacks import HeldOutKL
from lightning_rlhf.callbacks.held_out_kl import sampled_kl
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.functional import sum_by_sequence
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.objectives import SimPO
from tests.algorithms.conftest import random_groups
from tests.models.families import VOCABULARY


def loader(batch_size=4):
    return DataLoader(random_groups(8, 2), batch_size=batch_size, collate_fn=pack)


def test_zero_at_the_start_and_positive_later(trainer, tokenizer, llama):
    module = DPO(llama, tokenizer)
    run = trainer(callbacks=[HeldOutKL(num_prompts=6, max_new_tokens=5)])
    (values,) = run.validate(module, loader(), verbose=False)
    assert values["val/kl"] == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.5)
    (values,) = run.validate(module, loader(), verbose=False)
    (again,) = run.validate(module, loader(3), verbose=False)
    assert values["val/kl"] > 0.1
    assert again["val/kl"] == pytest.approx(values["val/kl"], rel=1e-5)  # the same prompts and seed


def test_the_estimate_is_that_of_the_exact_divergence(tokenizer, llama):
    """Two tokens can be summed out: KL = Σ p(y) log p(y)/q(y) over all answers of a prompt."""
    module = DPO(llama, tokenizer)
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.2)
    prompt, end = [5, 6, 7], tokenizer.eos_token_id
    answers = [[a, b] for a, b in itertools.product(range(VOCABULARY), repeat=2) if a not in (end, 2)]
    answers += [[a] for a in {end, 2}]
    batch = pack([PromptGroup(prompt, answers)])
    with torch.no_grad():
        log_p = sum_by_sequence(module.policy(batch).logprobs, batch.target_lengths)
        log_q = module.reference(batch)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    found = sampled_kl(module, [prompt], Sampling(max_new_tokens=2, num_samples=4000))
    assert found.mean().item() == pytest.approx(exact, abs=4 * found.std().item() / 4000**0.5)
    assert exact > 0.03


def test_training_is_not_changed(trainer, llama_dir):
    losses = []
    for callbacks in ([], [HeldOutKL(num_prompts=2, max_new_tokens=3)]):
        torch.manual_seed(0)
        module = DPO(Policy(llama_dir, lora=LoRA(r=2)), optimization=Optimization(lr=1e-2))
        run = trainer(max_epochs=2, callbacks=callbacks)
        shuffled = DataLoader(random_groups(8, 2), batch_size=4, collate_fn=pack, shuffle=True)
        run.fit(module, shuffled, loader())
        losses.append(run.callback_metrics["train/loss"].item())
    assert losses[0] == losses[1]
    assert run.callback_metrics["val/kl"] > 0


def test_without_a_reference_it_is_refused(trainer, tokenizer, llama):
    with pytest.raises(ValueError, match="HeldOutKL compares samples with the module's reference"):
        trainer(callbacks=[HeldOutKL()]).validate(DPO(llama, tokenizer, objective=SimPO()), loader())
