import copy
import math

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from lightning_rlhf import UnpairedDataModule
from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms import DPO, KTO, Optimization
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.models import LanguageModel, LoRA, Policy
from tests.algorithms.conftest import Gradients, away_from, labelled, random_groups
from tests.algorithms.test_trl_oracle import BARE, LAYOUTS, assert_same, ours, reference_at
from tests.algorithms.test_trl_oracle import theirs as their_step
from tests.models.families import tiny
from tests.tokenizers import letters

PLAIN_SGD = Optimization(name="sgd", lr=1e-2, schedule="constant")
NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "entropy",
)
WEIGHTS = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}


def loader(groups, batch_size=4):
    return DataLoader(groups, batch_size=batch_size, collate_fn=pack)


# --- TRL --------------------------------------------------------------------------------------------------------------


def their_kto(model, reference, path, **settings):
    trl = pytest.importorskip("trl")
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 2)
    args = trl.KTOConfig(output_dir=str(path), **WEIGHTS, **BARE, **settings)
    return trl.KTOTrainer(model, reference, args=args, train_dataset=rows, processing_class=letters())


def answers(groups):
    return [
        {
            "prompt_ids": g.prompt,
            "completion_ids": g.completions[0],
            "KL_completion_ids": g.completions[1],
            "label": g.extras["label"] == 1,
        }
        for g in groups
    ]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_trl(layout, loss_type, trainer, tmp_path):
    groups = labelled(6)
    reference = tiny("LlamaConfig")
    policy = away_from(reference, scale=0.05)
    oracle = their_kto(copy.deepcopy(policy), copy.deepcopy(reference), tmp_path, loss_type=loss_type)
    rows = answers(groups)
    if loss_type != "kto":
        rows = [{name: value for name, value in row.items() if name != "KL_completion_ids"} for row in rows]
    expected = their_step(oracle, rows)
    module = KTO(
        LanguageModel(policy, layout=layout),
        letters(),
        loss_type=loss_type,
        **WEIGHTS,
        reference=reference_at(reference, tmp_path / "reference"),
    )
    found = ours(module, groups, trainer)
    assert_same(found, expected, [name for name in NAMES if name != "kl" or loss_type == "kto"])
    if loss_type == "kto":
        assert expected[2]["kl"] > 1e-2  # the reference point does matter


# --- a step -----------------------------------------------------------------------------------------------------------


def test_inside_a_stock_trainer(trainer, tokenizer, llama):
    module = KTO(llama, tokenizer, beta=0.5, optimization=Optimization(lr=1e-2))
    run = trainer(max_epochs=8)
    run.fit(module, loader(labelled(8)), loader(labelled(8)))
    names = ("loss", *NAMES)
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in names} <= set(run.callback_metrics)
    assert run.callback_metrics["val/rewards/margins"] > 0.5
    assert run.callback_metrics["val/loss"] < 0.45
    (validated,) = run.validate(module, loader(labelled(8)), verbose=False)
    rewards = torch.cat(run.predict(module, loader(labelled(8))))
    good = torch.tensor([group.extras["label"] == 1 for group in labelled(8)])
    assert rewards.shape == (8,)
    assert rewards[good].mean().item() == pytest.approx(validated["val/rewards/chosen"], rel=1e-5)
    assert rewards[~good].mean().item() == pytest.approx(validated["val/rewards/rejected"], rel=1e-5)
    alone = torch.cat(run.predict(module, loader(labelled(8, k=1))))
    torch.testing.assert_close(alone, rewards, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_of_one_and_a_last_batch_of_one(batch_size, trainer, tokenizer, llama):
    """Four rows in batches of three leave one: its mismatched completion is another row's all the same."""
    module = KTO(llama, tokenizer, beta=0.5, optimization=Optimization(lr=1e-2))
    points = []
    point = module.reference_point
    module.reference_point = lambda *logps: points.append(point(*logps)) or points[-1]
    trainer(max_epochs=3).fit(module, loader(labelled(4), batch_size))
    assert len(points) == 3 * -(-4 // batch_size)
    assert points[0] == 0.0
    assert any(found > 0 for found in points)


def test_the_first_loss_is_half_of_the_weight(trainer, tokenizer, llama):
    seen = Gradients()
    module = KTO(llama, tokenizer, desirable_weight=3.0)
    groups = labelled(4, labels=[1.0, 1.0, 1.0, 0.0])
    trainer(callbacks=[seen]).fit(module, loader(groups))
    assert seen.losses[0] == pytest.approx((3 * 1.5 + 0.5) / 4, rel=1e-5)


def fixed(point):
    class Fixed(KTO):
        def reference_point(self, mismatched_logps, mismatched_ref_logps):
            return mismatched_logps.new_tensor(point)

    return Fixed


def steps_of(algorithm, groups, batch_size, accumulate, trainer, tokenizer):
    module = algorithm(tiny("LlamaConfig"), tokenizer, beta=0.5, optimization=PLAIN_SGD)
    seen = Gradients()
    trainer(accumulate_grad_batches=accumulate, callbacks=[seen]).fit(module, loader(groups, batch_size))
    return seen


def test_eight_accumulated_equal_a_batch_of_eight_with_a_fixed_point(trainer, tokenizer):
    """Twelve rows: the second window is shorter."""
    groups = labelled(12)
    whole = steps_of(fixed(0.4), groups, 8, 1, trainer, tokenizer)
    cut = steps_of(fixed(0.4), groups, 1, 8, trainer, tokenizer)
    assert len(whole.steps) == len(cut.steps) == 2
    for a, b in zip(whole.steps, cut.steps, strict=True):
        assert (a - b).norm() / a.norm() < 1e-5
    assert cut.losses[-1] == pytest.approx(whole.losses[-1], rel=1e-5)
    other = steps_of(fixed(3.0), groups, 8, 1, trainer, tokenizer)
    assert (other.steps[0] - whole.steps[0]).norm() / whole.steps[0].norm() > 1e-2  # the point does matter


def test_the_gradient_is_that_of_the_mean_and_none_flows_through_the_point(trainer, tokenizer, tmp_path):
    groups = labelled(6)
    start = tiny("LlamaConfig")
    policy = away_from(start, scale=0.05)
    expected_model = LanguageModel(copy.deepcopy(policy))
    reference = reference_at(start, tmp_path / "reference")
    found = ours(KTO(policy, letters(), beta=0.5, reference=reference), groups, trainer)
    batch = pack(groups)
    with torch.no_grad():
        ref = RF.sum_by_sequence(LanguageModel(start)(batch).logprobs, batch.target_lengths)
    logps = RF.sum_by_sequence(expected_model(batch).logprobs, batch.target_lengths)
    ratios = logps - ref
    point = ratios[1::2].detach().mean().clamp(min=0)
    assert point > 1e-2
    signs = 2 * batch.extras["label"] - 1
    loss = (1 - torch.sigmoid(0.5 * signs * (ratios[0::2] - point))).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in expected_model.parameters()])
    assert (found[1] - expected).norm() / expected.norm() < 1e-5
    assert found[0] == pytest.approx(loss.item(), rel=1e-5)


def test_a_closed_form_on_three_answers(tokenizer):
    """With z = 0 and one answer labelled, plain descent on −σ(βr) drives its probability to 1; undesirable to 0."""
    from lightning_rlhf.functional import sum_by_sequence

    prompt, completions = [5, 6], [[10], [11], [12]]
    for label, limit in ((1.0, 1.0), (0.0, 0.0)):
        module = fixed(0.0)(tiny("LlamaConfig"), tokenizer, beta=0.5)
        module._checked = True
        batch = pack([PromptGroup(prompt, [completions[0], completions[1]], extras={"label": label})])
        optimizer = torch.optim.Adam(module.policy.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            module.losses(batch, "val").sum().backward()
            optimizer.step()
        all_three = pack([PromptGroup(prompt, completions)])
        logps = sum_by_sequence(module.policy(all_three).logprobs, all_three.target_lengths)
        assert logps[0].exp().item() == pytest.approx(limit, abs=0.05)


# --- with data, adapters, a cache -------------------------------------------------------------------------------------

ROWS = [
    {"prompt": a, "completion": b * 3, "label": i % 2 == 0}
    for i, (a, b) in enumerate(zip("abcdefgh", "stuvwxyz", strict=True))
]


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["full", "lora"])
def test_a_precomputed_reference_changes_nothing(lora, trainer, llama_dir, tmp_path):
    losses = []
    for precompute in (False, True):
        torch.manual_seed(0)
        module = KTO(
            Policy(llama_dir, lora=lora),
            beta=0.5,
            optimization=Optimization(lr=1e-2),
            precompute_reference=precompute,
            cache_dir=str(tmp_path / "cache"),
        )
        seen = Gradients()
        run = trainer(max_epochs=3, callbacks=[seen])
        data = UnpairedDataModule(Dataset.from_list(ROWS), Dataset.from_list(ROWS), batch_size=3)
        run.fit(module, datamodule=data)
        losses.append([*seen.losses, run.callback_metrics["val/kl"].item()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] > 0
    assert losses[0][0] == pytest.approx(0.5, rel=1e-5)


def test_a_checkpoint_keeps_the_settings(trainer, llama_dir, tmp_path):
    module = KTO(Policy(llama_dir, lora=LoRA(r=2)), loss_type="apo_zero_unpaired", **WEIGHTS)
    run = trainer(max_steps=1)
    run.fit(module, loader(labelled(4, k=1)))
    assert "train/kl" not in run.callback_metrics
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = KTO.load_from_checkpoint(tmp_path / "last.ckpt")
    assert (again.loss_type, again.hyperparameters) == ("apo_zero_unpaired", WEIGHTS)


def test_metrics_of_a_window_without_one_kind_are_nan_and_not_made_up(trainer, tokenizer, llama):
    run = trainer(max_steps=1)
    run.fit(KTO(llama, tokenizer), loader(labelled(2, labels=[1.0, 1.0])))
    assert math.isnan(run.callback_metrics["train/rewards/rejected"])
    assert run.callback_metrics["train/rewards/chosen"] == pytest.approx(0.0, abs=1e-4)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_data_of_another_kind_is_refused(trainer, tokenizer, llama):
    with pytest.raises(
        ValueError, match="row 0: KTO needs a label for every answer .* use UnpairedDataModule"
    ):
        trainer().fit(KTO(llama, tokenizer), loader(random_groups(4, 2)))
    with pytest.raises(ValueError, match="row 0: KTO needs a labelled and a mismatched completion .* got 1"):
        trainer().fit(KTO(llama, tokenizer), loader(labelled(4, k=1)))
    with pytest.raises(ValueError, match="row 0: this is unpaired data, .* DPO needs pairs"):
        trainer().fit(DPO(llama, tokenizer), loader(labelled(4)))


def test_settings_out_of_range_are_refused(tokenizer, llama):
    with pytest.raises(ValueError, match="loss_type is 'bco'; it must be one of kto, apo_zero_unpaired"):
        KTO(llama, tokenizer, loss_type="bco")
    with pytest.raises(ValueError, match="beta must be positive"):
        KTO(llama, tokenizer, beta=0.0)
    with pytest.raises(ValueError, match="undesirable_weight must not be negative"):
        KTO(llama, tokenizer, undesirable_weight=-1.0)


def test_a_reference_that_is_not_the_policy_stops_the_run(trainer, tokenizer, llama):
    module = KTO(llama, tokenizer)
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="at step 0 policy and reference differ by .* nats a token"):
        trainer().fit(module, loader(labelled(4)))
