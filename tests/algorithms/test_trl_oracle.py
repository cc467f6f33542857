"""The gradient that the optimizer sees in ``Trainer.fit``, and the logged metrics, equal TRL's on the same tokens."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, SFT
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.models import LanguageModel
from lightning_rlhf.objectives import Sigmoid
from tests.algorithms.conftest import Gradients, away_from, random_groups
from tests.models.families import tiny
from tests.tokenizers import letters

trl = pytest.importorskip("trl")

LAYOUTS = ["shared_prefix", "padded"]
TOLERANCE = 1e-5
BETA = 0.3
DPO_NAMES = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen")
DPO_NAMES += ("logps/rejected", "mean_token_accuracy", "entropy")
BARE = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "save_strategy": "no",
}


def their_dpo(model, reference, path, **settings):
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    args = trl.DPOConfig(output_dir=str(path), beta=BETA, **BARE, **settings)
    return trl.DPOTrainer(model, reference, args=args, train_dataset=rows, processing_class=letters())


def their_sft(model, path, **settings):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    args = trl.SFTConfig(output_dir=str(path), **{"max_length": None, **BARE, **settings})
    return trl.SFTTrainer(model, args=args, train_dataset=rows, processing_class=letters())


def pairs(groups):
    return [
        {"prompt_ids": g.prompt, "chosen_ids": g.completions[0], "rejected_ids": g.completions[1]}
        for g in groups
    ]


def demonstrations(groups):
    return [
        {"input_ids": g.prompt + g.completions[0], "labels": [-100] * len(g.prompt) + g.completions[0]}
        for g in groups
    ]


def swapped(groups):
    return [PromptGroup(g.prompt, list(g.completions)[::-1], row_id=g.row_id) for g in groups]


def theirs(trainer, rows):
    """TRL's loss, gradient and metrics of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), flat_gradient(trainer.model), metrics


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def ours(module, groups, trainer):
    """Our loss, the gradient handed to the optimizer, and the logged metrics of one step of a stock Trainer."""
    gradients = Gradients()
    run = trainer(max_steps=1, callbacks=[gradients])
    run.fit(module, DataLoader(groups, batch_size=len(groups), collate_fn=pack))
    return gradients.losses[0], gradients.steps[0], run.callback_metrics


def assert_same(one, other, names):
    assert one[0] == pytest.approx(other[0], rel=TOLERANCE)
    assert (one[1] - other[1]).norm() <= TOLERANCE * other[1].norm()
    assert other[1].norm() > 0
    for name in names:
        assert one[2][f"train/{name}"].item() == pytest.approx(other[2][name], rel=1e-4, abs=1e-5), name


def reference_at(model, path):
    model.save_pretrained(path)
    letters().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo(layout, trainer, tmp_path):
    groups = random_groups(6, 2)
    reference = tiny("LlamaConfig")
    policy = away_from(reference)
    expected = theirs(their_dpo(copy.deepcopy(policy), copy.deepcopy(reference), tmp_path), pairs(groups))
    module = DPO(
        LanguageModel(policy, layout=layout),
        letters(),
        objective=Sigmoid(beta=BETA),
        reference=reference_at(reference, tmp_path / "reference"),
    )
    found = ours(module, groups, trainer)
    assert abs(expected[0] - math.log(2)) > 1e-3  # the log-ratios do matter
    assert_same(found, expected, DPO_NAMES)


def test_dpo_with_label_smoothing(trainer, tmp_path):
    """cDPO is (1 − ε) of TRL's loss plus ε of its loss on swapped pairs; its own ``sigmoid`` ignores the setting."""
    groups, epsilon = random_groups(6, 2), 0.2
    reference = tiny("LlamaConfig")
    policy = away_from(reference)
    oracle = their_dpo(copy.deepcopy(policy), copy.deepcopy(reference), tmp_path, label_smoothing=epsilon)
    kept, flipped = theirs(oracle, pairs(groups)), theirs(oracle, pairs(swapped(groups)))
    module = DPO(
        policy,
        letters(),
        objective=Sigmoid(beta=BETA, label_smoothing=epsilon),
        reference=reference_at(reference, tmp_path / "reference"),
    )
    found = ours(module, groups, trainer)
    expected = [(1 - epsilon) * a + epsilon * b for a, b in zip(kept[:2], flipped[:2], strict=True)]
    assert abs(kept[0] - expected[0]) > 1e-3
    assert_same(found, [*expected, kept[2]], DPO_NAMES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo_of_a_real_model_on_real_pairs(layout, assets, trainer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_rlhf.data import load_rows, tokenize_preference
    from lightning_rlhf.data.collate import group_of

    path = assets / "stories260K-hf"
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = load_rows(assets / "preferences" / "hh_helpful_test.jsonl.gz").select(range(12))
    rows = rows.filter(lambda row: row["chosen"] != row["rejected"])
    tokenized = tokenize_preference(
        rows, AutoTokenizer.from_pretrained(path), max_length=128, on_bad_row="drop"
    )[0]
    groups = [group_of(row) for row in tokenized][:3]
    expected = theirs(their_dpo(copy.deepcopy(policy), copy.deepcopy(policy), tmp_path), pairs(groups))
    found = ours(
        DPO(LanguageModel(policy, layout=layout), letters(), objective=Sigmoid(beta=BETA)), groups, trainer
    )
    assert found[0] == pytest.approx(math.log(2), rel=1e-6)
    assert_same(found, expected, ("logps/chosen", "logps/rejected", "mean_token_accuracy", "entropy"))


@pytest.mark.parametrize("settings", [{}, {"padding_free": True}], ids=["padded", "padding_free"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft(layout, settings, trainer, tmp_path):
    groups = random_groups(6, 1)
    policy = tiny("LlamaConfig")
    expected = theirs(their_sft(copy.deepcopy(policy), tmp_path, **settings), demonstrations(groups))
    found = ours(SFT(LanguageModel(policy, layout=layout), letters()), groups, trainer)
    assert_same(found, expected, ("mean_token_accuracy", "entropy"))
