import math

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, OnlineDPO, Optimization
from lightning_rlhf.algorithms.rollout import Micro
from lightning_rlhf.callbacks import ExactResume
from lightning_rlhf.data import PromptCollator
from lightning_rlhf.data.packing import pack
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.objectives import BCO, IPO, Sigmoid, SimPO
from lightning_rlhf.rewards import Reward
from tests.algorithms.conftest import Gradients, away_from, random_groups
from tests.models.families import tiny

SAMPLING = Sampling(max_new_tokens=6, num_samples=4)


class ShareOfA(Reward):
    def forward(self, samples):
        return torch.tensor(
            [
                text.count("a") / len(ids)
                for text, ids in zip(samples.completions, samples.completion_ids, strict=True)
            ]
        )


class Same(Reward):
    def forward(self, samples):
        return torch.zeros(len(samples))


class Ids(Reward):
    """Hardly ever ties."""

    def forward(self, samples):
        return torch.tensor([sum(x * 0.37**i for i, x in enumerate(ids)) for ids in samples.completion_ids])


class Halves(Reward):
    """Ties often."""

    def forward(self, samples):
        return torch.tensor([float(ids[0] > 20) for ids in samples.completion_ids])


def prompts(count=8, size=4):
    rows = [
        {"prompt_ids": [5 + i, 6, 7], "text": "xyz", "messages": None, "columns": {}, "row_id": i}
        for i in range(count)
    ]
    return DataLoader(rows, batch_size=size, collate_fn=PromptCollator())


def module_of(policy, reward=None, **settings):
    defaults = {"sampling": SAMPLING, "optimization": Optimization(lr=1e-2, schedule="constant")}
    return OnlineDPO(policy, reward or ShareOfA(), **{**defaults, **settings})


def test_best_and_worst_of_every_prompt(llama_dir):
    module = module_of(llama_dir, sampling=Sampling(num_samples=3))
    scores = torch.tensor([0.5, 2.0, -1.0, 1.0, 1.0, 1.0, 3.0, 4.0, 3.5])
    assert module.best_and_worst(scores) == [1, 2, 7, 6]  # the second prompt is tied
    assert float(module._metric("train", "pairs/tied").compute()) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "objective", [Sigmoid(beta=0.3), IPO(beta=0.3), SimPO()], ids=lambda o: type(o).__name__
)
def test_the_loss_of_given_pairs_is_that_of_dpo(objective, tokenizer, llama, trainer):
    """Loss and gradient; DPO is compared with TRL elsewhere."""
    batch = pack(random_groups(5, 2))
    offline = DPO(llama, tokenizer, objective=objective)
    if offline.needs_reference:
        offline.reference.model = away_from(offline.reference.model)
    offline._checked = True
    expected = offline.losses(batch, "train")
    online = module_of(away_from(llama, scale=0.0), tokenizer=tokenizer, objective=objective)
    reference = offline.reference or online.reference
    known = {"ref_logprobs": reference.logprobs(batch)}
    found = online.pair_losses(Micro(batch, known))
    torch.testing.assert_close(found, expected)
    assert found.std() > 1e-3
    expected.mean().backward()
    found.mean().backward()
    for (name, a), b in zip(offline.policy.named_parameters(), online.policy.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["full", "lora"])
def test_it_learns_what_the_reward_likes(lora, llama_dir, trainer):
    module = module_of(
        Policy(llama_dir, lora=lora),
        optimization=Optimization(lr=1e-2, schedule="constant", warmup_ratio=0.0),
    )
    run = trainer(max_epochs=12)
    (before,) = run.validate(module, prompts(32, 16), verbose=False)
    run.fit(module, prompts(32, 16), prompts(32, 16))
    after = run.callback_metrics
    assert before["val/objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert before["val/objective/scores"] < 0.1
    assert after["val/objective/scores"] > 0.4
    assert after["val/objective/kl"] > 0.5
    assert after["train/rewards/accuracies"] > 0.5
    assert after["train/loss"] < math.log(2)
    assert 0.0 <= after["train/pairs/tied"] <= 1.0


def test_the_first_loss_is_ln_2_and_the_first_kl_0(llama_dir, trainer):
    run = trainer(max_steps=1)
    run.fit(module_of(llama_dir), prompts())
    assert run.callback_metrics["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert run.callback_metrics["train/objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert {"train/rewards/share_of_a", "train/rewards/margins", "train/completions/mean_length"} <= set(
        run.callback_metrics
    )


def test_ties_teach_nothing(llama_dir, trainer):
    module = module_of(llama_dir, Same(), optimization=Optimization(lr=0.1, name="sgd", schedule="constant"))
    module.configure_model()
    before = [p.clone() for p in module.policy.parameters()]
    run = trainer(max_steps=2)
    run.fit(module, prompts())
    assert run.global_step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, module.policy.parameters(), strict=True))
    assert run.callback_metrics["train/pairs/tied"] == 1.0
    assert "train/loss" not in run.callback_metrics


@pytest.mark.parametrize("objective", [Sigmoid(), BCO(beta=1.0)], ids=["sigmoid", "bco"])
def test_a_step_does_not_depend_on_how_it_is_cut(objective, llama_dir, trainer):
    """Also where batches differ in how many of their prompts are tied."""
    seen = []
    for size, window in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        gradients = Gradients()
        module = module_of(llama_dir, Halves(), objective=objective, optimization=Optimization(lr=1e-3))
        run = trainer(max_epochs=3, accumulate_grad_batches=window, callbacks=[gradients])
        run.fit(module, prompts(8, size))
        assert module.num_rollouts == run.global_step == 3
        seen.append(gradients.steps)
        assert 0.0 < run.callback_metrics["train/pairs/tied"] < 1.0
    for a, b in zip(*seen, strict=True):
        assert (a - b).norm() / a.norm() < 1e-4


def test_the_gradient_is_clipped(llama_dir, trainer):
    gradients = Gradients()
    run = trainer(max_steps=1, gradient_clip_val=1e-3, callbacks=[gradients])
    run.fit(module_of(llama_dir), prompts())
    assert gradients.steps[0].norm() == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("every", [None, 2])
def test_a_resumed_run_continues_bit_for_bit(every, lora, llama_dir, trainer, tmp_path):
    """The reference that follows the policy included: saved at step 2, before it has become the policy."""

    def fresh():
        torch.manual_seed(0)
        return module_of(Policy(llama_dir, lora=lora), Ids(), reference_update_steps=every)

    whole = fresh()
    run = trainer(max_epochs=3, callbacks=[ExactResume()])
    run.fit(whole, prompts(4, 2))
    part = fresh()
    first = trainer(max_epochs=1, callbacks=[ExactResume()])
    first.fit(part, prompts(4, 2))
    first.save_checkpoint(tmp_path / "part.ckpt")
    again = fresh()
    second = trainer(max_epochs=3, callbacks=[ExactResume()])
    second.fit(again, prompts(4, 2), ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    others = {
        "train/time/generation_share",
        "train/rewards/length_correlation",
    }  # measured in seconds; may be nan
    assert {n: v for n, v in second.callback_metrics.items() if n not in others} == {
        n: v for n, v in run.callback_metrics.items() if n not in others
    }
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.num_rollouts == 6


@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["full", "lora"])
def test_the_reference_becomes_the_policy_every_so_many_steps(lora, llama_dir, trainer):
    losses = []

    class Watch(Gradients):
        def on_train_epoch_end(self, trainer, module):
            losses.append(float(trainer.callback_metrics["train/loss"]))

    module = module_of(Policy(llama_dir, lora=lora), Ids(), reference_update_steps=2)
    run = trainer(max_epochs=4, callbacks=[Watch()])
    run.fit(module, prompts(4, 4))
    assert module.reference.kind == ("model" if lora is None else "adapter")
    at_ln_2 = [abs(loss - math.log(2)) < 1e-5 for loss in losses]
    assert at_ln_2 == [True, False, True, False]
    assert module.reference_step == 2


def test_what_does_not_fit_is_refused(llama_dir, tmp_path):
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        module_of(llama_dir, sampling=Sampling(num_samples=1))
    with pytest.raises(ValueError, match="reference_update_steps must be at least 1, got 0"):
        module_of(llama_dir, reference_update_steps=0)
    with pytest.raises(ValueError, match="leave reference out"):
        module_of(llama_dir, reference_update_steps=2, reference=llama_dir)
    module = module_of(Policy(llama_dir, lora=LoRA(r=2)))
    module.configure_model()
    with pytest.raises(ValueError, match="no weights of its own"):
        module.reference.follow()


def test_a_reference_of_another_shape_cannot_follow(tokenizer, llama):
    module = module_of(llama, tokenizer=tokenizer)
    module.reference.model = tiny("GPT2Config")
    with pytest.raises(ValueError, match="another model than the policy"):
        module.reference.follow()
