import pytest
import torch
from jsonargparse import ArgumentParser
from transformers.cache_utils import DynamicLayer

from lightning_rlhf.generation import Generator, HFGenerator, Sampling, generate
from lightning_rlhf.generation.choosing import SeededChoice
from lightning_rlhf.generation.prefill import SPARE, SpareLayer, keeps_keys_and_values
from lightning_rlhf.models import LanguageModel
from tests.models.families import SUPPORTED, UNSUPPORTED, tiny
from tests.tokenizers import letters

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12]]


@pytest.fixture
def model():
    return LanguageModel(tiny("LlamaConfig"))


def tokens(model, prompts, **settings):
    sampling = Sampling(**{"max_new_tokens": 12, **settings})
    return [[c.tokens for c in group] for group in generate(model, letters(), prompts, sampling)]


def test_left_padding_changes_nothing(model):
    together = tokens(model, PROMPTS, temperature=0)
    alone = [tokens(model, [prompt], temperature=0)[0] for prompt in PROMPTS]
    assert together == alone


def test_greedy_follows_the_argmax(model):
    ((found,),) = tokens(model, PROMPTS[:1], temperature=0)
    ids = list(PROMPTS[0])
    for token in found:
        assert model.model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
        ids.append(token)


def test_samples_follow_the_temperature(model):
    torch.manual_seed(0)
    (group,) = tokens(model, PROMPTS[:1], num_samples=4000, max_new_tokens=1, temperature=0.5)
    counts = torch.bincount(torch.tensor([sample[0] for sample in group]), minlength=97) / 4000
    expected = (model.model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.5).softmax(-1)
    assert (counts - expected).abs().max() < 0.03


def test_ends_at_the_end_token_and_says_what_was_cut(model):
    torch.manual_seed(0)
    groups = list(generate(model, letters(), PROMPTS, Sampling(max_new_tokens=60, num_samples=8)))
    completions = [c for group in groups for c in group]
    assert [len(group) for group in groups] == [8, 8, 8]
    assert {c.truncated for c in completions} == {True, False}
    for completion in completions:
        assert completion.truncated == (2 not in completion.tokens)
        assert 2 not in completion.tokens[:-1]
        assert "</s>" not in completion.text


def test_mode_is_restored_and_batches_cover_all(model):
    model.train()
    assert len(tokens(model, PROMPTS, batch_size=2)) == 3
    assert model.training


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"temperature": 0.0, "num_samples": 2}, "greedy samples are all the same"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"top_p": 0.0}, "top_p .0.0. must lie in"),
        ({"top_k": -1}, "top_k .-1. not be negative"),
        ({"min_new_tokens": 129}, "min_new_tokens .129. must lie between 0 and max_new_tokens .128."),
        ({"stop": "end"}, "stop must be a list of strings"),
        ({"stop": [""]}, "stop must be a list of strings"),
    ],
)
def test_refuses_slips(settings, match):
    with pytest.raises(ValueError, match=match):
        Sampling(**settings)


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_samples_belong_to_the_seed_of_their_prompt_not_to_its_neighbours(model):
    settings = {"num_samples": 4, "max_new_tokens": 12}

    def draw(prompts, seeds, **more):
        sampling = Sampling(**settings, **more)
        return [
            [c.tokens for c in group] for group in generate(model, letters(), prompts, sampling, seeds=seeds)
        ]

    whole = draw(PROMPTS, [7, 8, 9])
    assert draw(PROMPTS[::-1], [9, 8, 7]) == whole[::-1]
    assert draw(PROMPTS, [7, 8, 9], batch_size=1) == whole
    assert draw(PROMPTS[1:2], [8]) == whole[1:2]
    assert draw(PROMPTS, [7, 5, 9])[1] != whole[1]
    assert len({tuple(tokens) for tokens in whole[0]}) == 4


def test_without_seeds_the_global_state_decides_and_moves_on_once(model):
    torch.manual_seed(3)
    first, state = tokens(model, PROMPTS, num_samples=2), torch.get_rng_state()
    second = tokens(model, PROMPTS, num_samples=2)
    torch.manual_seed(3)
    assert tokens(model, PROMPTS, num_samples=2, batch_size=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert second != first


def test_what_cannot_be_sampled_is_refused(model):
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        list(generate(model, letters(), PROMPTS, Sampling(), seeds=[1, 2]))
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        list(generate(model, letters(), [[5], []], Sampling()))


def test_the_choice_inverts_the_cumulative_distribution():
    """0.1, 0, 0.5, 0.4: a number in [0, 0.1) takes the first token, [0.1, 0.6) the third, the rest the last."""
    scores = torch.tensor([[0.1, 0.0, 0.5, 0.4]]).log()
    for number, token in [(0.0, 0), (0.099, 0), (0.101, 2), (0.599, 2), (0.601, 3), (1 - 1e-16, 3)]:
        choose = SeededChoice(torch.tensor([[9.0, number]], dtype=torch.float64), prompt_length=4)
        assert choose(torch.zeros(1, 5).long(), scores).argmax().item() == token


@pytest.mark.parametrize(("settings", "kept"), [({"top_k": 3}, 3), ({"top_p": 0.5}, None), ({}, 97)])
def test_samples_follow_the_truncated_distribution(model, settings, kept):
    (group,) = tokens(model, PROMPTS[:1], num_samples=4000, max_new_tokens=1, temperature=0.7, **settings)
    counts = torch.bincount(torch.tensor([sample[0] for sample in group]), minlength=97) / 4000
    expected = (model.model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1)
    ordered, order = expected.sort(descending=True)
    kept = kept or int((ordered.cumsum(0) < 0.5).sum()) + 1
    expected[order[kept:]] = 0
    assert (counts[order[kept:]] == 0).all()
    assert (counts - expected / expected.sum()).abs().max() < 0.03


# --- ends -------------------------------------------------------------------------------------------------------------


def test_no_end_before_the_least_number_of_tokens(model):
    settings = {"num_samples": 8, "max_new_tokens": 40}
    lengths = [len(t) for group in tokens(model, PROMPTS, **settings) for t in group]
    assert min(lengths) < 20
    found = [t for group in tokens(model, PROMPTS, min_new_tokens=20, **settings) for t in group]
    assert all(2 not in t[:20] and len(t) > 20 for t in found)
    assert min(map(len, found)) < 40


def test_stop_strings_cut_the_text_and_keep_the_token_that_completes_them(model):
    tokenizer = letters()
    settings = {"num_samples": 32, "max_new_tokens": 40}
    plain = [
        c
        for group in generate(model, tokenizer, PROMPTS, Sampling(**settings), seeds=[1, 2, 3])
        for c in group
    ]
    text = next(c.text for c in plain if len(c.text) > 20)
    stop = (text[6:8], text[12])
    found = [
        c
        for group in generate(model, tokenizer, PROMPTS, Sampling(stop=stop, **settings), seeds=[1, 2, 3])
        for c in group
    ]
    cut = 0
    for free, stopped in zip(plain, found, strict=True):
        written = [tokenizer.decode(free.tokens[:k]) for k in range(len(free.tokens) + 1)]
        first = next((k for k, text in enumerate(written) if any(s in text for s in stop)), None)
        if first is None:
            assert stopped == free
            continue
        cut += 1
        assert stopped.tokens == free.tokens[:first]
        assert not stopped.truncated
        assert free.text.startswith(stopped.text)
        assert not any(s in stopped.text for s in stop)
    assert 0 < cut < len(plain)


def test_stop_strings_are_not_looked_for_in_prompts(model):
    """Neither inside them nor across the border, where what follows would be taken for an end that was sampled."""
    tokenizer = letters()
    ((free,),) = generate(model, tokenizer, PROMPTS[:1], Sampling(max_new_tokens=9), seeds=[4])
    across = tokenizer.decode(PROMPTS[0])[-1] + free.text[0]
    assert across not in free.text
    stop = [across, tokenizer.decode(PROMPTS[0])]
    assert list(
        generate(model, tokenizer, PROMPTS[:1], Sampling(max_new_tokens=9, stop=stop), seeds=[4])
    ) == [[free]]


def test_a_special_token_as_stop_string(model):
    settings = {"num_samples": 16, "max_new_tokens": 30}
    groups = [
        list(generate(model, letters(), PROMPTS, Sampling(stop=stop, **settings), seeds=[1, 2, 3]))
        for stop in ((), ("</s>",))
    ]
    assert groups[0] == groups[1]


# --- the prompt is computed once --------------------------------------------------------------------------------------

LONG = [
    [5, 6, 7, 8, 9, 10, 11, 12, 13],
    [10],
    [11, 12],
]  # longer than the window of the families that have one
SHARING = [name for name in [*SUPPORTED, *UNSUPPORTED] if name not in ("BloomConfig", "MambaConfig")]


@pytest.mark.parametrize("name", [*SUPPORTED, *UNSUPPORTED])
def test_samples_are_those_without_sharing(name, monkeypatch):
    model = LanguageModel(tiny(name), layout="padded")
    settings = {"num_samples": 3, "max_new_tokens": 8}
    assert keeps_keys_and_values(model) == (name in SHARING)
    shared = list(generate(model, letters(), LONG, Sampling(**settings), seeds=[1, 2, 3]))
    monkeypatch.setattr("lightning_rlhf.generation.prefill.shared_prefill", lambda *_: None)
    assert list(generate(model, letters(), LONG, Sampling(**settings), seeds=[1, 2, 3])) == shared


def test_tokens_computed(model):
    """Prompts but their last token once, that token and all but the last of the new ones for every sample."""
    counted = []
    model.causal_lm.get_decoder().layers[0].register_forward_hook(
        lambda module, args, output: counted.append(args[0].shape[0] * args[0].shape[1])
    )
    tokens(model, LONG, num_samples=4, max_new_tokens=5, min_new_tokens=5)
    assert counted == [3 * 8, *[3 * 4] * 5]
    counted.clear()
    tokens(model, LONG, max_new_tokens=5, min_new_tokens=5)
    assert counted == [3 * 9, *[3] * 4]


def test_prompts_of_a_like_length_stand_together(model):
    """The shortest two of three are no longer padded to the longest; order and samples stay."""
    whole = tokens(model, LONG, temperature=0)
    counted = []
    model.causal_lm.get_decoder().layers[0].register_forward_hook(
        lambda module, args, output: counted.append(args[0].shape[0] * args[0].shape[1])
    )
    prompts = [LONG[1], LONG[0], LONG[2], LONG[0]]
    found = tokens(model, prompts, temperature=0, batch_size=2)
    assert found == [whole[1], whole[0], whole[2], whole[0]]
    assert [count for count in counted if count > 2] == [2 * 9, 2 * 2]


def test_spare_memory_keeps_what_concatenation_keeps():
    torch.manual_seed(0)
    spare, plain = SpareLayer(), DynamicLayer()
    for length in (3, 1, 1, SPARE, 1, 5):
        keys, values = torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 6)
        for one, other in zip(spare.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(one, other)
        assert spare.get_seq_length() == plain.get_seq_length()
    further = SpareLayer(plain.keys, plain.values)
    before = further.keys
    keys, _ = further.update(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 6))
    assert keys.data_ptr() == before.data_ptr()  # nothing was copied
    assert torch.equal(keys[:, :, :-1], plain.keys)


# --- what it leaves behind --------------------------------------------------------------------------------------------


def snapshot(model):
    return {
        "training": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "use_cache": model.config.use_cache,
        "settings": model.causal_lm.generation_config,
        "written": model.causal_lm.generation_config.to_dict(),
        "adapters": [(m._active_adapter, m._disable_adapters) for m in model._tuner_layers()],
    }


def test_everything_is_as_it_was():
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(
        tiny("LlamaConfig"), LoraConfig(target_modules="all-linear", lora_dropout=0.5)
    )
    peft_model.add_adapter("reference", LoraConfig(target_modules="all-linear"))
    model = LanguageModel(peft_model)
    model.enable_gradient_checkpointing()
    model.train()
    model.causal_lm.get_decoder().layers[1].eval()  # a part that is frozen by its owner
    model.config.use_cache = False
    with model.role("reference"):
        before = snapshot(model)
        tokens(model, PROMPTS, num_samples=2, stop=("a",), min_new_tokens=2)
        assert snapshot(model) == before
        with pytest.raises(IndexError):
            tokens(model, [[10_000]])
        assert snapshot(model) == before


def test_settings_that_came_with_the_model_do_not_change_the_distribution(model):
    expected = tokens(model, PROMPTS, temperature=0)
    settings = model.causal_lm.generation_config
    settings.repetition_penalty, settings.top_k, settings.no_repeat_ngram_size = 50.0, 1, 1
    assert tokens(model, PROMPTS, temperature=0) == expected
    assert len({tuple(t) for t in tokens(model, PROMPTS[:1], num_samples=9)[0]}) > 1


def test_gradients_in_4_bits_are_the_same_after_sampling(llama_dir):
    """On some processors a forward in eval mode repacks 4-bit layers to a kernel without gradients."""
    from lightning_rlhf.data.packing import PromptGroup, pack
    from lightning_rlhf.models import LoRA, Policy, Quantization, load_language_model

    batch = pack([PromptGroup(PROMPTS[0], [[20, 21, 22], [23]])])
    policy = Policy(llama_dir, lora=LoRA(r=4), quantization=Quantization(bits=4))
    model = load_language_model(policy)
    model.train()

    def gradients():
        model.zero_grad()
        model(batch).logprobs.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    tokens(model, PROMPTS, num_samples=2)
    after = gradients()
    assert before
    assert any(g.any() for g in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- the interface ----------------------------------------------------------------------------------------------------


def test_the_generator_is_configurable_and_equals_the_function(model):
    parser = ArgumentParser()
    parser.add_argument("--generator", type=Generator)
    parser.add_argument("--sampling", type=Sampling)
    given = parser.parse_args(["--generator", "HFGenerator", "--sampling.stop", '["a", "b"]'])
    made = parser.instantiate(given)
    assert isinstance(made.generator, HFGenerator)
    assert list(made.sampling.stop) == ["a", "b"]
    found = made.generator.generate(model, letters(), PROMPTS, Sampling(max_new_tokens=5), seeds=[1, 2, 3])
    assert list(found) == list(
        generate(model, letters(), PROMPTS, Sampling(max_new_tokens=5), seeds=[1, 2, 3])
    )
