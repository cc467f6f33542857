"""Scores are the same in this package and in AutoModelForSequenceClassification, in both directions."""

import json

import pytest
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf.algorithms import RewardModel
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.models import LoRA, Policy, Quantization, load_language_model, load_scorer
from lightning_rlhf.models.adapters import member_adapter
from lightning_rlhf.models.export import read_checkpoint
from lightning_rlhf.models.reward_directory import add_scorer
from lightning_rlhf.models.reward_export import average_members, export_reward_model, read_members
from tests.algorithms.conftest import random_groups
from tests.tokenizers import letters

LETTERS = len(letters())


def spelt(ids):
    """Any ids as those of letters: no special token among them."""
    return [4 + i % (LETTERS - 4) for i in ids]


GROUPS = [
    PromptGroup(spelt(g.prompt), [spelt(c) for c in g.completions]) for g in random_groups(5, 2, seed=3)
]
BATCH = pack(GROUPS)
TEXTS = [list(g.prompt) + list(c) for g in GROUPS for c in g.completions]


def trained(policy, tmp_path, trainer, groups=None, **settings):
    """A checkpoint of a reward model that took one real step and whose scale was set."""
    torch.manual_seed(0)
    module = RewardModel(policy, **settings)
    loader = DataLoader(groups or random_groups(6, 2), batch_size=3, collate_fn=pack)
    run = trainer(max_steps=4)
    run.fit(module, loader, loader)
    path = tmp_path / "reward.ckpt"
    run.save_checkpoint(path)
    with torch.no_grad():
        return module.eval(), path


@torch.no_grad()
def their_scores(model, pad):
    """Right-padded, as users of the class do."""
    width = max(map(len, TEXTS))
    ids = torch.tensor([t + [pad] * (width - len(t)) for t in TEXTS])
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in TEXTS])
    return model.eval()(input_ids=ids, attention_mask=mask).logits.squeeze(-1)


def assert_equal_up_to_the_mean(theirs, ours, folder):
    mean = json.loads((folder / "score_normalization.json").read_text())["mean"]
    torch.testing.assert_close(theirs.float() - mean, ours, rtol=1e-4, atol=1e-5)
    assert ours.std() > 0.1  # normalised scores that differ


def test_full_fine_tuning(llama_dir, tmp_path, trainer):
    module, path = trained(llama_dir, tmp_path, trainer)
    out = tmp_path / "rm"
    assert export_reward_model(path, out) == "RewardModel model"
    ours = module.predict_step(BATCH, 0).detach()
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    assert theirs.config.num_labels == 1
    pad = AutoTokenizer.from_pretrained(out).pad_token_id
    assert theirs.config.pad_token_id == pad != AutoTokenizer.from_pretrained(out).eos_token_id
    assert_equal_up_to_the_mean(their_scores(theirs, pad), ours, out)
    torch.testing.assert_close(load_scorer(str(out))(BATCH), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
def test_lora(merge, llama_dir, tmp_path, trainer):
    module, path = trained(Policy(llama_dir, lora=LoRA(r=2)), tmp_path, trainer)
    out = tmp_path / "rm"
    export_reward_model(path, out, merge=merge)
    ours = module.predict_step(BATCH, 0).detach()
    if merge:
        theirs = AutoModelForSequenceClassification.from_pretrained(out)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(llama_dir, num_labels=1)
        theirs = PeftModel.from_pretrained(base, out)
    pad = AutoTokenizer.from_pretrained(out).pad_token_id
    theirs.config.pad_token_id = pad
    assert_equal_up_to_the_mean(their_scores(theirs, pad), ours, out)
    torch.testing.assert_close(load_scorer(str(out))(BATCH), ours, rtol=1e-4, atol=1e-5)


def test_a_classifier_made_elsewhere_is_loaded(llama_dir, tmp_path):
    theirs = AutoModelForSequenceClassification.from_pretrained(llama_dir, num_labels=1)
    theirs.config.pad_token_id = 0
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(tmp_path / "theirs")
    ours = load_scorer(str(tmp_path / "theirs"))(BATCH)
    torch.testing.assert_close(ours, their_scores(theirs, 0), rtol=1e-4, atol=1e-5)
    # ... and trained further, from its head.
    module = RewardModel(str(tmp_path / "theirs"))
    module.configure_model()
    torch.testing.assert_close(module.predict_step(BATCH, 0).detach(), ours)


def test_from_a_quantised_base(llama_dir, tmp_path, trainer):
    quantised = Policy(llama_dir, lora=LoRA(r=2), quantization=Quantization(compute_dtype="float32"))
    module, path = trained(quantised, tmp_path, trainer)
    ours = module.predict_step(BATCH, 0).detach()
    export_reward_model(path, tmp_path / "rm")
    again = load_scorer(Policy(str(tmp_path / "rm"), quantization=quantised.quantization))
    torch.testing.assert_close(again(BATCH), ours, rtol=1e-4, atol=1e-4)


def test_a_member_and_the_members_of_an_ensemble(llama_dir, tmp_path, trainer):
    policy = Policy(llama_dir, lora=LoRA(r=2))
    module, path = trained(policy, tmp_path, trainer, num_members=3, member_share=0.7)
    members = module.ensemble.normalized(module.ensemble.raw(BATCH)).detach()
    export_reward_model(path, tmp_path / "all")
    export_reward_model(path, tmp_path / "one", member=2)
    for index in range(3):
        found = load_scorer(str(tmp_path / "all" / f"member_{index}"))(BATCH)
        torch.testing.assert_close(found, members[index], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load_scorer(str(tmp_path / "one"))(BATCH), members[2], rtol=1e-4, atol=1e-5)
    assert (members[0] - members[2]).abs().max() > 1e-2


def test_full_members_are_models_of_their_own(llama_dir, tmp_path, trainer):
    module, path = trained(llama_dir, tmp_path, trainer, num_members=2)
    members = module.ensemble.normalized(module.ensemble.raw(BATCH)).detach()
    export_reward_model(path, tmp_path / "all")
    for index in range(2):
        found = load_scorer(str(tmp_path / "all" / f"member_{index}"))(BATCH)
        torch.testing.assert_close(found, members[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_average_is_of_the_updates(rslora, llama_dir, tmp_path, trainer):
    policy = Policy(llama_dir, lora=LoRA(r=2, use_rslora=rslora))
    module, path = trained(policy, tmp_path, trainer, num_members=3, shared_head_init=True)
    members = read_members(read_checkpoint(path)["state_dict"])
    ((averaged, head),), settings = average_members(members, policy)
    scale = lambda r, alpha: alpha / (r**0.5 if rslora else r)  # noqa: E731
    down = next(name for name in averaged if "lora_A" in name)
    up = down.replace("lora_A", "lora_B")
    mean = sum(scale(2, LoRA.alpha) * w[up] @ w[down] for w, _ in members) / 3
    torch.testing.assert_close(scale(settings.r, settings.lora_alpha) * averaged[up] @ averaged[down], mean)
    # As an adapter and merged it is the same model.
    export_reward_model(path, tmp_path / "adapter", average=True)
    export_reward_model(path, tmp_path / "merged", average=True, merge=True)
    one, other = (load_scorer(str(tmp_path / name))(BATCH) for name in ("adapter", "merged"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_reward_adapter_beside_a_policy_on_one_base(llama_dir, tmp_path, trainer):
    """LoRA on a base shared with a policy: the same scores, and the policy's own output is untouched."""
    module, path = trained(Policy(llama_dir, lora=LoRA(r=2)), tmp_path, trainer)
    export_reward_model(path, tmp_path / "rm")
    policy = load_language_model(Policy(llama_dir, lora=LoRA(r=4)))
    before = policy(BATCH).logprobs.detach()
    trainable = {n for n, p in policy.named_parameters() if p.requires_grad}
    scorer = add_scorer(policy, str(tmp_path / "rm"), "reward")
    torch.testing.assert_close(scorer(BATCH), module.predict_step(BATCH, 0).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy(BATCH).logprobs.detach(), before)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trainable
    assert not any("model" in name for name, _ in scorer.named_parameters())


def test_what_is_no_reward_model_is_refused_as_a_scorer(llama_dir):
    with pytest.raises(ValueError, match="no trained score head, and a random one would score at random"):
        load_scorer(llama_dir)


def test_a_head_of_another_base_is_refused(llama_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = AutoModelForSequenceClassification.from_pretrained(llama_dir, num_labels=1)
    theirs.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["score.weight"] = torch.ones(1, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"score head has width 3, the model \d+: it was trained on another base"
    ):
        load_scorer(str(tmp_path))


def test_several_labels_are_refused(llama_dir, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(llama_dir, num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 labels; a reward model has one"):
        load_scorer(str(tmp_path))


def test_padding_is_never_the_end_token(llama_dir, tmp_path, trainer):
    """A tokenizer without any other special token gets a new one, and the embedding a row that nothing reads."""
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.unk_token = tokenizer.eos_token
    model_dir = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    model.resize_token_embeddings(LETTERS)
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    module, path = trained(str(model_dir), tmp_path, trainer, groups=GROUPS)
    export_reward_model(path, tmp_path / "rm")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    pad = AutoTokenizer.from_pretrained(tmp_path / "rm").pad_token_id
    assert pad == theirs.config.pad_token_id == LETTERS
    assert theirs.config.vocab_size == LETTERS + 1
    ours = module.predict_step(BATCH, 0).detach()
    assert_equal_up_to_the_mean(their_scores(theirs, pad), ours, tmp_path / "rm")


def test_members_are_named(tmp_path, llama_dir, trainer):
    _, path = trained(Policy(llama_dir, lora=LoRA(r=2)), tmp_path, trainer)
    with pytest.raises(ValueError, match="member 1 of an ensemble of 1"):
        export_reward_model(path, tmp_path / "rm", member=1)
    with pytest.raises(ValueError, match="average takes all members"):
        export_reward_model(path, tmp_path / "rm", average=True)
    assert member_adapter(1) == "member_1"


def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no score head: it is not a reward model's"):
        read_members({"policy.model.x": torch.zeros(1)})
