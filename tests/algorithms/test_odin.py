"""ODIN: its losses by hand, what it takes out of a reward model, and that only the quality head is kept."""

import random

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms import ODIN, Optimization, RewardModel
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.metrics import LengthCorrelation
from lightning_rlhf.models.reward_export import export_reward_model
from tests.models.families import tiny
from tests.tokenizers import letters


def test_the_length_loss_is_pearsons_correlation_with_a_gradient():
    torch.manual_seed(0)
    lengths = torch.randint(1, 50, (12,))
    quality, beside = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    expected = torch.corrcoef(torch.stack([quality, lengths.double()]))[0, 1].abs()
    expected = expected - torch.corrcoef(torch.stack([beside, lengths.double()]))[0, 1]
    torch.testing.assert_close(RF.odin_length_loss(quality, beside, lengths), expected)
    assert torch.autograd.gradcheck(lambda q, b: RF.odin_length_loss(q, b, lengths), (quality, beside))
    constant = torch.ones(12, requires_grad=True)
    RF.odin_length_loss(constant, constant, lengths).backward()
    assert torch.isfinite(constant.grad).all()


def groups_by_quality_and_length(count, seed):
    """Of two answers the better one begins with 9, the other with 8, nine times of ten; it is mostly longer."""
    draw = random.Random(seed)
    groups = []
    for row in range(count):
        lengths = sorted(draw.sample(range(2, 9), 2), reverse=draw.random() < 0.8)
        firsts = (9, 8) if draw.random() < 0.9 else (8, 9)
        texts = [
            [first, *(draw.randint(5, 7) for _ in range(n))] for first, n in zip(firsts, lengths, strict=True)
        ]
        groups.append(PromptGroup([4, 6], texts, row_id=row))
    return groups


def fitted(trainer, odin):
    torch.manual_seed(0)
    module = RewardModel(tiny("LlamaConfig"), letters(), odin=odin, optimization=Optimization(lr=3e-3))
    data = DataLoader(groups_by_quality_and_length(256, 0), batch_size=32, collate_fn=pack)
    trainer(max_epochs=8).fit(module, data)
    held_out = pack(groups_by_quality_and_length(256, 1))
    with torch.no_grad():
        scores = module.eval().ensemble.raw(held_out)[0]
    correlation = LengthCorrelation()
    correlation.update(scores, torch.tensor([n for c in held_out.completion_lengths for n in c]))
    better, worse = scores.view(-1, 2).T
    return module, correlation.compute().item(), (better > worse).float().mean().item()


def test_length_leaves_the_scores_that_are_kept(trainer, tmp_path):
    _, plain, _ = fitted(trainer, None)
    module, controlled, accuracy = fitted(trainer, ODIN())
    assert plain > 0.4
    assert abs(controlled) < plain / 2
    assert accuracy > 0.7  # what is left still tells the better answer
    own, beside = module.ensemble.heads[0].weight, module.length_heads.heads[0].weight
    assert RF.odin_orthogonality(own, beside).item() < 0.3


def test_only_the_quality_head_is_exported(trainer, tmp_path):
    tiny("LlamaConfig").save_pretrained(tmp_path / "base")
    letters().save_pretrained(tmp_path / "base")
    module = RewardModel(str(tmp_path / "base"), odin=ODIN())
    data = DataLoader(groups_by_quality_and_length(8, 0), batch_size=8, collate_fn=pack)
    run = trainer(max_steps=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "end.ckpt")
    export_reward_model(tmp_path / "end.ckpt", tmp_path / "exported")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(loaded.score.weight, module.ensemble.heads[0].weight)
    again = RewardModel.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    for mine, theirs in zip(again.length_heads.parameters(), module.length_heads.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_loss_is_of_both_heads_and_the_penalties():
    torch.manual_seed(0)
    module = RewardModel(tiny("LlamaConfig"), letters(), odin=ODIN(length_coef=0.5, orthogonal_coef=2.0))
    batch = pack(groups_by_quality_and_length(6, 0))
    with torch.no_grad():
        found = module.losses(batch, "train")[0]
        end = module.ensemble.members[0].ends(batch)
        own, beside = module.ensemble.heads[0], module.length_heads.heads[0]
        total = (own(end) + beside(end)).view(-1, 2)
        lengths = torch.tensor([n for c in batch.completion_lengths for n in c])
        penalty = 0.5 * RF.odin_length_loss(own(end), beside(end), lengths)
        penalty = penalty + 2.0 * RF.odin_orthogonality(own.weight, beside.weight)
    expected = RF.bradley_terry_loss(total[:, 0], total[:, 1]) + penalty
    torch.testing.assert_close(found, expected)


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match=r"odin.length_coef must be at least 0, got -1"):
        ODIN(length_coef=-1)
