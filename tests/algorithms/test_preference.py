"""DPO with the objectives of its family: what is made, kept, refused, and what warns."""

import copy
import math
import re
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_rlhf.algorithms import DPO, Optimization
from lightning_rlhf.data.packing import pack
from lightning_rlhf.models import LanguageModel, LoRA, Policy
from lightning_rlhf.objectives import AOT, BCO, IPO, ORPO, SFTTerm, Sigmoid, SimPO, Weighted
from tests.algorithms.conftest import Gradients, random_groups
from tests.models.families import tiny

SGD = Optimization(name="sgd", lr=1e-2, schedule="constant")


def loader(batch_size=4, count=8):
    return DataLoader(random_groups(count, 2), batch_size=batch_size, collate_fn=pack)


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "objective", [SimPO(), ORPO(), Weighted([SimPO(), SFTTerm()], [1.0, 0.1])], ids=lambda o: type(o).__name__
)
def test_no_reference_is_made_where_none_is_needed(objective, lora, trainer, llama_dir, monkeypatch):
    def no_model(value, *rest, deepcopy=copy.deepcopy):
        assert not isinstance(value, LanguageModel | PreTrainedModel)
        return deepcopy(value, *rest)

    monkeypatch.setattr("copy.deepcopy", no_model)
    monkeypatch.delattr("lightning_rlhf.models.Reference.logprobs")
    module = DPO(Policy(llama_dir, lora=lora), objective=objective)
    run = trainer(max_epochs=1)
    run.fit(module, loader(), loader())
    assert module.reference is None
    assert not [name for name, _ in module.named_parameters() if "reference" in name]
    assert "val/rewards/margins" in run.callback_metrics
    assert "val/logps/chosen_change" not in run.callback_metrics


def test_a_sum_makes_a_reference_where_one_part_needs_it(tokenizer, llama):
    assert DPO(llama, tokenizer, objective=Weighted([SFTTerm(), IPO()], [1.0, 1.0])).reference is not None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"objective": SimPO(), "precompute_reference": True}, "SimPO has no reference"),
        ({"objective": SimPO(), "reference": "somewhere"}, "SimPO has no reference: leave out reference"),
        ({"ld_alpha": 1.5}, r"ld_alpha must lie in \[0, 1\], got 1.5"),
        ({"objective": AOT(), "wpo": True}, "AOT sorts its batch"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings, match, tokenizer, llama):
    with pytest.raises(ValueError, match=match):
        DPO(llama, tokenizer, **settings)


OBJECTIVES = [
    Sigmoid(),
    IPO(),
    BCO(),
    SimPO(),
    ORPO(average="sequences"),
    Weighted([BCO(), SimPO()], [1.0, 0.5]),
]


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.3, "wpo": True}], ids=["plain", "ld+wpo"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_eight_accumulated_equal_a_batch_of_eight(objective, options, trainer, tokenizer):
    steps = []
    for batch_size, accumulate in ((8, 1), (1, 8)):
        seen = Gradients()
        module = DPO(tiny("LlamaConfig"), tokenizer, objective=objective, optimization=SGD, **options)
        run = trainer(accumulate_grad_batches=accumulate, callbacks=[seen], max_epochs=2)
        run.fit(module, loader(batch_size, 12), loader(batch_size, 12))
        steps.append((seen.steps, run.callback_metrics["val/rewards/length_correlation"].item()))
    (whole, correlation), (cut, cut_correlation) = steps
    assert len(whole) == len(cut) == 4
    for a, b in zip(whole, cut, strict=True):
        assert (a - b).norm() < 2e-5 * a.norm()
    assert cut_correlation == pytest.approx(correlation, abs=1e-4)


def test_the_running_mean_of_rewards_follows_and_survives_a_checkpoint(trainer, tokenizer, llama, tmp_path):
    objective = BCO(beta=0.5)
    reference = copy.deepcopy(llama)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    module = DPO(llama, tokenizer, objective=objective, optimization=Optimization(name="sgd", lr=0.5))
    rewards = []

    def watched(batch, batch_idx, step=module.training_step):
        mean = module.reward_mean.value.item()
        rewards.append((mean, module.score(batch)))
        return step(batch, batch_idx)

    module.training_step = watched
    run = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[saver])
    run.fit(module, loader(2))
    for step, (mean, _) in enumerate(rewards):
        before = torch.cat([r for _, r in rewards[:step]]).double().mean() if step else torch.zeros(())
        assert mean == pytest.approx(before.item(), rel=1e-5, abs=1e-9)
    assert abs(rewards[-1][0]) > 1e-4
    again = DPO(reference, tokenizer, objective=objective)
    again.load_state_dict(torch.load(saver.last_model_path, weights_only=True)["state_dict"])
    assert again.reward_mean.value == module.reward_mean.value
    assert again.to(torch.bfloat16).reward_mean.value.dtype == torch.float64


def test_score_is_the_implicit_reward_of_any_completions(tokenizer, llama):
    module = DPO(llama, tokenizer, objective=Sigmoid(beta=0.3), ld_alpha=0.5)
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.1)
    batch = pack(random_groups(2, 3))
    scores = module.score(batch)
    logps = [part.sum() for part in module.policy(batch).logprobs.split(batch.num_targets)]
    expected = 0.3 * (torch.stack(logps) - module.reference(batch))
    torch.testing.assert_close(scores, expected.detach())
    assert scores.abs().max() > 1e-3
    free = DPO(llama, tokenizer, objective=SimPO(beta=2.0))
    torch.testing.assert_close(free.score(batch), 2.0 * (torch.stack(logps) / batch.target_lengths).detach())


def test_validation_shows_displacement_and_length_bias(trainer, tokenizer, llama):
    module = DPO(llama, tokenizer, objective=Sigmoid(beta=0.3))
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.3)
    module._checked = True
    (values,) = trainer().validate(module, loader(3, 8), verbose=False)
    batch = pack(random_groups(8, 2))
    rewards = module.score(batch)
    assert values["val/logps/chosen_change"] == pytest.approx(values["val/rewards/chosen"] / 0.3, rel=1e-5)
    per_token = rewards[0::2] / 0.3 / batch.target_lengths[0::2]
    assert values["val/logps/chosen_change_per_token"] == pytest.approx(per_token.mean().item(), rel=1e-5)
    expected = torch.corrcoef(torch.stack([rewards, batch.target_lengths.float()]))[0, 1].item()
    assert values["val/rewards/length_correlation"] == pytest.approx(expected, rel=1e-4)


def test_large_displacement_warns_once_and_says_what_helps(trainer, tokenizer, llama):
    module = DPO(llama, tokenizer)
    said = []
    for scale in (1.0, 2.0, 1.0):  # sharper, so that random answers become much less likely
        with torch.no_grad():
            llama.lm_head.weight.mul_(scale)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer().validate(module, loader(), verbose=False)
        said.append([str(w.message) for w in caught if "displacement" in str(w.message)])
    assert [len(messages) for messages in said] == [0, 1, 0]
    assert re.search(r"have lost \d\.\d\d nats a token.*SFTTerm.*APOZero", said[1][0])


def test_first_losses_of_a_training(trainer, tokenizer):
    """Policy and reference agree: known values, whatever the model."""
    for objective, value in ((IPO(beta=0.5), 1.0), (BCO(), 2 * math.log(2)), (Sigmoid(), math.log(2))):
        seen = Gradients()
        module = DPO(tiny("LlamaConfig"), tokenizer, objective=objective, optimization=SGD)
        trainer(max_steps=1, callbacks=[seen]).fit(module, loader())
        assert seen.losses[0] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("objective", [Sigmoid(), SimPO(gamma=1.0)], ids=["Sigmoid", "SimPO"])
def test_training_separates_the_pairs(objective, trainer, tokenizer, llama):
    module = DPO(llama, tokenizer, objective=objective, optimization=Optimization(lr=1e-2))
    run = trainer(max_epochs=6)
    run.fit(module, loader())
    assert run.callback_metrics["train/rewards/accuracies"] == 1


def test_a_precomputed_reference_knows_ld_alpha(trainer, llama_dir, tmp_path):
    """The stored sums are those of the same α; another α is another file."""
    import json

    from lightning_rlhf.data import PreferenceDataModule

    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p {n}", "chosen": "a" * n + "b", "rejected": "c"} for n in range(1, 7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for alpha in (1.0, 0.25):
        for precompute in (False, True):
            data = PreferenceDataModule(train=str(path), batch_size=3, num_workers=0)
            module = DPO(
                Policy(llama_dir),
                objective=IPO(),
                optimization=SGD,
                precompute_reference=precompute,
                cache_dir=str(tmp_path / "cache"),
                ld_alpha=alpha,
            )
            run = trainer(max_epochs=2)
            run.fit(module, datamodule=data)
            losses[alpha, precompute] = run.callback_metrics["train/loss"].item()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for alpha in (1.0, 0.25):
        assert losses[alpha, True] == pytest.approx(losses[alpha, False], rel=1e-5)
