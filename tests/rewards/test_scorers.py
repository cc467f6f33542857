"""Models as rewards score what they would score were they given the text directly."""

import json

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms import DPO, Optimization, RewardModel
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.models import Aggregation, LoRA, Policy, load_language_model, load_scorer
from lightning_rlhf.models.export import export_checkpoint
from lightning_rlhf.models.reward_export import export_reward_model
from lightning_rlhf.rewards import (
    ImplicitReward,
    Normalized,
    RewardEnsemble,
    RewardError,
    RewardModelReward,
    Samples,
    ShapedReward,
    WeightedReward,
    score,
)
from lightning_rlhf.rewards.encoding import SampleEncoder, same_tokenizer
from tests.algorithms.conftest import random_groups
from tests.tokenizers import letters

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'][0] + ':' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>a:' }}{% endif %}"
)
PROMPTS = ["Who is it?", "Why?", "Who is it?", "Where to, then", "Why?"]
ANSWERS = ["Me.", "No", "You, of course", "There.", "I see"]
EOS = 2


def ids_of(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def samples_from(tokenizer, prompts=PROMPTS, truncated=(1,)):
    """Samples as a policy with this tokenizer would draw them."""
    cut = [i in truncated for i in range(len(prompts))]
    return Samples(
        prompts,
        ANSWERS,
        [
            ids_of(p if isinstance(p, str) else f"<s>u:{p[0]['content']}</s>\n<s>a:", tokenizer)
            for p in prompts
        ],
        [ids_of(a, tokenizer) + [EOS] * (not c) for a, c in zip(ANSWERS, cut, strict=True)],
        cut,
    )


@pytest.fixture(scope="module")
def reward_dirs(llama_dir, tmp_path_factory):
    """A reward model, and two adapters of reward models on the policy's base, each after some real steps."""
    folder = tmp_path_factory.mktemp("rewards")
    for name, policy in (
        ("full", llama_dir),
        ("adapter", Policy(llama_dir, lora=LoRA(r=2, dropout=0.5))),
        ("other", Policy(llama_dir, lora=LoRA(r=2))),
    ):
        torch.manual_seed(len(name))
        module = RewardModel(policy)
        loader = DataLoader(random_groups(6, 2), batch_size=3, collate_fn=pack)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=4,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(module, loader, loader)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        export_reward_model(folder / f"{name}.ckpt", folder / name)
    return folder


def other_tokenizer():
    """Two letters swapped: the same ids mean other text."""
    tokenizer = letters()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    swapped = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=swapped, **tokenizer.special_tokens_map)


@torch.no_grad()
def direct(scorer, tokenizer, texts):
    """Scores of whole texts, one by one, nothing shared: what the model says of ``prompt + completion``."""
    rows = [ids_of(text, tokenizer) for text in texts]
    return torch.cat([scorer(pack([PromptGroup(row[:1], [row[1:]])])) for row in rows])


def plain_texts(samples):
    """Closed as in training, but for what was cut off."""
    rows = zip(samples.prompts, samples.completions, samples.truncated, strict=True)
    return [prompt + answer + "</s>" * (not cut) for prompt, answer, cut in rows]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_text_is_scored_with_the_reward_models_own_tokenizer(reward_dirs, batch_size):
    reward = RewardModelReward(str(reward_dirs / "full"), batch_size=batch_size)
    sampling = other_tokenizer()
    reward.attach(None, sampling)
    assert not reward.encoder.as_sampled
    samples = samples_from(sampling)
    expected = direct(reward.scorer, letters(), plain_texts(samples))
    torch.testing.assert_close(score(reward, samples).total, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1
    # Had the ids been taken as they are, they would have been other text.
    reward.encoder.as_sampled = True
    assert not torch.allclose(score(reward, samples).total, expected, atol=1e-2)


def test_sampled_ids_of_the_same_tokenizer_are_used_as_they_are(reward_dirs):
    reward = RewardModelReward(str(reward_dirs / "full"), batch_size=2)
    samples = samples_from(letters())
    by_text = score(reward, samples).total
    reward.attach(None, letters())
    assert reward.encoder.as_sampled
    torch.testing.assert_close(score(reward, samples).total, by_text, rtol=1e-4, atol=1e-5)
    # It is the ids that are read: the text may say something else, as where a tokenizer does not round-trip.
    lying = Samples(samples.prompts, ["?"] * 5, samples.prompt_ids, samples.completion_ids, samples.truncated)
    torch.testing.assert_close(score(reward, lying).total, by_text, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_computed_once_for_its_samples():
    samples = samples_from(letters())
    encoder = SampleEncoder(letters())
    for as_sampled in (False, True):
        encoder.as_sampled = as_sampled
        ((places, batch),) = encoder.batches(samples, 32)
        assert places == [0, 2, 1, 4, 3]
        assert batch.num_groups == 3
        assert batch.prompt_lengths == (10, 4, 14)
        assert [len(chunk) for chunk, _ in encoder.batches(samples, 2)] == [2, 2, 1]


@pytest.mark.parametrize("truncated", [(), (1, 3)])
def test_conversations_are_written_by_the_reward_models_template(reward_dirs, truncated):
    reward = RewardModelReward(str(reward_dirs / "full"))
    tokenizer = reward.encoder.tokenizer
    tokenizer.chat_template = TEMPLATE
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    samples = samples_from(tokenizer, chats, truncated)
    texts = [
        f"<s>u:{prompt}</s>\n<s>a:{answer}" + "</s>\n" * (i not in truncated)
        for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
    ]
    expected = direct(reward.scorer, tokenizer, texts)
    torch.testing.assert_close(score(reward, samples).total, expected, rtol=1e-4, atol=1e-5)
    # The sampled ids end with </s>, and the reward model was trained to be read at the line's end behind it.
    same = letters()
    same.chat_template = TEMPLATE
    reward.attach(None, same)
    assert reward.encoder.as_sampled
    torch.testing.assert_close(score(reward, samples).total, expected, rtol=1e-4, atol=1e-5)


def test_tokenizers_are_compared_by_what_they_do():
    chat = letters()
    chat.chat_template = TEMPLATE
    assert same_tokenizer(letters(), letters())
    assert not same_tokenizer(letters(), other_tokenizer())
    assert not same_tokenizer(letters(), chat)
    assert not same_tokenizer(letters(), letters(eos_token="<pad>"))


def test_an_empty_completion_is_scored_as_an_end(reward_dirs):
    reward = RewardModelReward(str(reward_dirs / "full"))
    expected = direct(reward.scorer, letters(), ["Why?</s>"])
    for completion_ids in ([], [EOS]):
        for cut in (False, True):
            samples = Samples(["Why?"], [""], [ids_of("Why?", letters())], [completion_ids], [cut])
            for as_sampled in (False, True):
                reward.encoder.as_sampled = as_sampled
                torch.testing.assert_close(score(reward, samples).total, expected, rtol=1e-4, atol=1e-5)


def test_more_tokens_than_the_model_was_made_for_are_refused(reward_dirs):
    reward = RewardModelReward(str(reward_dirs / "full"))
    room = reward.language_model.config.max_position_embeddings
    long = Samples(["a" * room], ["b"], [[5]], [[6]], [False])
    with pytest.raises(
        RewardError, match=f"the reward 'reward_model' failed: .* was made for {room}: sample less"
    ):
        score(reward, long)


def test_an_adapter_on_the_policys_base(reward_dirs, llama_dir):
    policy = load_language_model(Policy(llama_dir, lora=LoRA(r=4)))
    batch = pack(random_groups(2, 2))
    before = policy(batch).logprobs.detach()
    trainable = {n for n, p in policy.named_parameters() if p.requires_grad}
    path = str(reward_dirs / "adapter")
    reward = RewardModelReward(path, share_base=True)
    samples = samples_from(letters())
    with pytest.raises(RewardError, match="needs the policy whose base it shares: call attach"):
        score(reward, samples)
    two = WeightedReward(
        {"one": reward, "two": RewardModelReward(str(reward_dirs / "other"), share_base=True)}
    )
    two.attach(policy, letters())
    two.attach(policy, letters())  # once is enough, twice does no harm
    assert set(policy.model.peft_config) == {"default", "reward_reward_model", "reward_reward_model_2"}
    policy.train()  # as in training: no dropout in the reward's adapter
    parts = score(two, samples).parts
    for part, name in (("one", "adapter"), ("two", "other")):
        alone = direct(load_scorer(str(reward_dirs / name)), letters(), plain_texts(samples))
        torch.testing.assert_close(parts[part], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy(batch).logprobs.detach(), before)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trainable
    assert not list(two.parameters())


def test_a_built_scorer(reward_dirs):
    scorer = load_scorer(str(reward_dirs / "full"))
    samples = samples_from(letters())
    built = score(RewardModelReward(scorer, tokenizer=letters()), samples).total
    torch.testing.assert_close(built, score(RewardModelReward(str(reward_dirs / "full")), samples).total)
    with pytest.raises(ValueError, match="a built scorer needs its tokenizer"):
        RewardModelReward(scorer)


def test_an_ensemble(reward_dirs):
    names = ["full", "adapter", "other"]
    samples = samples_from(letters())
    ensemble = RewardEnsemble(
        [str(reward_dirs / n) for n in names], Aggregation("uncertainty_weighted", coef=0.5)
    )
    result = score(ensemble, samples)
    alone = torch.stack([score(RewardModelReward(str(reward_dirs / n)), samples).total for n in names])
    torch.testing.assert_close(result.total, alone.mean(0) - 0.5 * alone.var(0, correction=0))
    torch.testing.assert_close(result.parts["member_1"], alone[1])
    torch.testing.assert_close(result.parts["disagreement"], alone.std(0, correction=0))
    assert tuple(result.parts) == ensemble.part_names
    worst = RewardEnsemble([str(reward_dirs / n) for n in names], Aggregation("worst_case"))
    torch.testing.assert_close(score(worst, samples).total, alone.amin(0))


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_the_reward_that_a_dpo_policy_implies(lora, llama_dir, tmp_path, trainer):
    module = DPO(Policy(llama_dir, lora=lora), optimization=Optimization(lr=1e-2))
    loader = DataLoader(random_groups(6, 2), batch_size=3, collate_fn=pack)
    run = trainer(max_steps=4)
    run.fit(module, loader)
    run.save_checkpoint(tmp_path / "dpo.ckpt")
    export_checkpoint(tmp_path / "dpo.ckpt", tmp_path / "dpo")
    reward = ImplicitReward(str(tmp_path / "dpo"), llama_dir, beta=0.3, batch_size=2)
    assert len(reward._models) == (2 if lora is None else 1)
    samples = samples_from(letters())
    policy, reference = (load_language_model(Policy(p)) for p in (str(tmp_path / "dpo"), llama_dir))
    batch = pack(PromptGroup(p, [c]) for p, c in zip(samples.prompt_ids, samples.completion_ids, strict=True))
    with torch.no_grad():
        logps = [RF.sum_by_sequence(m(batch).logprobs, batch.target_lengths) for m in (policy, reference)]
    expected = 0.3 * (logps[0] - logps[1])
    assert expected.abs().max() > 1e-3
    for tokenizer in (other_tokenizer(), letters()):  # by text, and by ids
        reward.attach(None, tokenizer)
        torch.testing.assert_close(score(reward, samples).total, expected, rtol=1e-3, atol=1e-5)


def test_settings_are_checked(llama_dir):
    with pytest.raises(ValueError, match="is no reward model"):
        RewardModelReward(llama_dir)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        ImplicitReward(llama_dir, llama_dir, beta=0)
    with pytest.raises(ValueError, match="members is empty"):
        RewardEnsemble([])


def test_an_algorithm_with_a_reward_keeps_its_statistics_only(reward_dirs, llama_dir):
    module = DPO(llama_dir)
    module.reward = ShapedReward(RewardModelReward(str(reward_dirs / "full")), [Normalized()])
    module.configure_model()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    module.reward.attach(module.policy, module.tokenizer)
    score(module.reward, samples_from(letters()))
    assert {n for n in module.state_dict() if n.startswith("reward")} == {"reward.shapers.0._extra_state"}
    assert {name for name, p in module.named_parameters() if p.requires_grad} == trained
    assert not any(name.startswith("reward") for name in trained)
    module.load_state_dict(module.state_dict())
