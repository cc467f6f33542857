"""The tokenizer is exact on all text of the sandbox; the model is small, seeded and can be loaded by anybody."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf.sandbox import World, build_policy, build_tokenizer
from lightning_rlhf.sandbox.language import sentences, tokenize


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def rows():
    world = World(seed=0)
    return [
        *world.demonstrations(300),
        *({"prompt": p, "completion": b} for p, _, b in world.pairs(300, "val")),
    ]


def test_round_trip(tokenizer, rows):
    for text in (*sentences(), *(text for row in rows for text in row.values())):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.convert_ids_to_tokens(ids) == tokenize(text)


def test_prompt_and_completion_join_at_a_token(tokenizer, rows):
    for row in rows:
        prompt, completion = tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids
        assert prompt + completion == tokenizer(row["prompt"] + row["completion"]).input_ids


def test_special_tokens_are_distinct(tokenizer):
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == [0, 1, 2, 3]
    assert tokenizer("robin 🙂").input_ids.count(tokenizer.unk_token_id) >= 1


def test_chat_template_makes_the_plain_text(tokenizer, rows):
    for row in rows[:20]:
        user = {"role": "user", "content": row["prompt"].strip()}
        messages = [user, {"role": "assistant", "content": row["completion"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == row["prompt"] + row["completion"] + tokenizer.eos_token
        head = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        assert head == row["prompt"]


def test_chat_template_marks_the_answer(tokenizer, rows):
    messages = [
        {"role": "user", "content": rows[0]["prompt"].strip()},
        {"role": "assistant", "content": rows[0]["completion"]},
    ]
    marked = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    prompt = len(tokenizer(rows[0]["prompt"]).input_ids)
    mask = marked["assistant_masks"]
    assert mask == [0] * prompt + [1] * (len(mask) - prompt)
    assert marked["input_ids"][-1] == tokenizer.eos_token_id


def test_policy_is_small_and_seeded(tokenizer):
    state = torch.get_rng_state()
    policy, same, other = build_policy(tokenizer), build_policy(tokenizer), build_policy(tokenizer, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert 350_000 < sum(parameter.numel() for parameter in policy.parameters()) < 430_000
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    weight = policy.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, same.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)
    assert policy.generation_config.eos_token_id == policy.config.eos_token_id == tokenizer.eos_token_id
    assert policy.generation_config.pad_token_id == policy.config.pad_token_id == tokenizer.pad_token_id


def test_deeper(tokenizer):
    assert len(build_policy(tokenizer, num_layers=4).model.layers) == 4
    assert len(build_policy(tokenizer).model.layers) == 2


def test_saved_and_loaded(tokenizer, rows, tmp_path):
    policy = build_policy(tokenizer)
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = rows[0]["prompt"] + rows[0]["completion"]
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.chat_template, loaded.eos_token) == (tokenizer.chat_template, tokenizer.eos_token)
    ids = torch.tensor([loaded(text).input_ids])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    torch.testing.assert_close(model(ids).logits, policy(ids).logits, rtol=0, atol=0)


def test_an_untrained_policy_is_judged(tokenizer):
    world = World(seed=0)
    prompt = world.prompts(1)[0]
    ids = torch.tensor([tokenizer(prompt).input_ids])
    output = build_policy(tokenizer).generate(input_ids=ids, max_new_tokens=64, do_sample=True)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    report = world.report(prompt, text, truncated=True)
    assert report.malformed
    assert report.score < 0
