"""Token heads: their losses by hand, in both layouts, what they teach, and that only the score is kept."""

import random

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from lightning_rlhf.algorithms import ODIN, Optimization, RewardModel, TokenHead
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.models.reward_export import export_reward_model
from tests.models.families import tiny
from tests.tokenizers import letters


def groups_with_a_slip(count, seed):
    """Two long answers of random letters; in the worse one a 9 stands somewhere. A fifth of the labels is wrong."""
    draw = random.Random(seed)
    groups = []
    for row in range(count):
        clean = [draw.randint(5, 8) for _ in range(20)]
        slip = [draw.randint(5, 8) for _ in range(20)]
        slip[draw.randrange(20)] = 9
        texts = [clean, slip] if seed or draw.random() < 0.8 else [slip, clean]
        groups.append(PromptGroup([4, 6], texts, row_id=row))
    return groups


def test_the_losses_by_hand():
    torch.manual_seed(0)
    module = RewardModel(tiny("LlamaConfig"), letters(), token_head=TokenHead(coef=0.5, agreement_coef=2.0))
    groups = [PromptGroup([4, 6], [[5, 7, 9], [8]]), PromptGroup([4], [[6, 6], [7, 5, 5, 9]])]
    batch = pack(groups)
    own, beside = module.ensemble.heads[0], module.token_heads.heads[0]
    with torch.no_grad():
        found = module.losses(batch, "train")[0]
        validated = module.losses(batch, "val")[0]
        scores, sums = [], []
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor([[*group.prompt, *completion]])
                hidden = module.policy.causal_lm.model(input_ids=ids).last_hidden_state[0]
                scores.append(own(hidden[-1:]))
                sums.append(beside(hidden[len(group.prompt) :]).sum())
    scores, sums = torch.cat(scores).view(-1, 2), torch.stack(sums).view(-1, 2)
    lead, lead_of_sums = scores[:, 0] - scores[:, 1], sums[:, 0] - sums[:, 1]
    plain = -torch.nn.functional.logsigmoid(lead)
    expected = plain - 0.5 * torch.nn.functional.logsigmoid(lead_of_sums) + 2.0 * (lead - lead_of_sums) ** 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(validated, plain)


def test_agreement_moves_the_score_alone():
    heads = RewardModel(tiny("LlamaConfig"), letters(), token_head=TokenHead(agreement_coef=3.0)).token_heads
    lead, sums = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[2.0]], requires_grad=True)
    heads.losses(lead, sums, None).sum().backward()
    assert lead.grad.item() == -6.0
    assert sums.grad.item() == pytest.approx(-torch.sigmoid(torch.tensor(-2.0)).item())


def test_both_layouts_read_the_same_tokens():
    batch = pack(groups_with_a_slip(3, 1))
    ids = batch.input_ids[batch.completions]
    padded = batch.padded()
    assert torch.equal(padded.input_ids.flatten()[padded.completions], ids)
    assert ids.tolist() == [token for g in batch.groups() for c in g.completions for token in c]
    assert torch.equal(batch.completions[batch.target_lengths.cumsum(0) - 1], batch.ends)


def test_a_slip_is_learnt_and_found_where_it_stands(trainer):
    torch.manual_seed(0)
    module = RewardModel(
        tiny("LlamaConfig"), letters(), token_head=TokenHead(), optimization=Optimization(lr=1e-2)
    )
    data = DataLoader(groups_with_a_slip(256, 0), batch_size=32, collate_fn=pack)
    trainer(max_epochs=6).fit(module, data)
    held_out = pack(groups_with_a_slip(256, 1))
    with torch.no_grad():
        better, worse = module.eval().ensemble.raw(held_out)[0].view(-1, 2).T
        rewards = module.token_heads.heads[0](module.ensemble.members[0].tokens(held_out))
    assert (better > worse).float().mean().item() > 0.85
    slips = held_out.input_ids[held_out.completions] == 9
    assert rewards[slips].mean() < rewards[~slips].mean() - 2 * rewards[~slips].std()


def test_only_the_score_is_exported(trainer, tmp_path):
    tiny("LlamaConfig").save_pretrained(tmp_path / "base")
    letters().save_pretrained(tmp_path / "base")
    module = RewardModel(str(tmp_path / "base"), token_head=TokenHead(), num_members=2)
    run = trainer(max_steps=1)
    run.fit(module, DataLoader(groups_with_a_slip(8, 0), batch_size=8, collate_fn=pack))
    assert all(head.weight.grad is not None for head in module.token_heads.heads)
    run.save_checkpoint(tmp_path / "end.ckpt")
    export_reward_model(tmp_path / "end.ckpt", tmp_path / "exported")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported" / "member_0")
    torch.testing.assert_close(loaded.score.weight, module.ensemble.heads[0].weight)
    again = RewardModel.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    for mine, theirs in zip(again.token_heads.parameters(), module.token_heads.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"token_head.coef must be positive, got 0"):
        TokenHead(coef=0)
    with pytest.raises(ValueError, match=r"token_head.agreement_coef must be at least 0, got -1"):
        TokenHead(agreement_coef=-1)
    with pytest.raises(ValueError, match="odin and token_head both train a second head: give one of them"):
        RewardModel(tiny("LlamaConfig"), letters(), odin=ODIN(), token_head=TokenHead())
