import warnings

import pytest
import torch

from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.functional import sum_by_sequence
from lightning_rlhf.models import LanguageModel, LoRA, Policy
from lightning_rlhf.models import attention as A
from lightning_rlhf.models.loading import prepare
from tests.models.families import SUPPORTED, UNSUPPORTED, VOCABULARY, WINDOW, tiny


def random_ids(count):
    return torch.randint(3, VOCABULARY, (count,)).tolist()


@pytest.fixture
def batch():
    """Prompts and completions longer than the window, groups of one, two and three completions."""
    torch.manual_seed(1)
    return pack(
        [
            PromptGroup(random_ids(WINDOW + 5), [random_ids(4), random_ids(WINDOW + 3)], row_id=0),
            PromptGroup(random_ids(1), [random_ids(7)], row_id=1),
            PromptGroup(random_ids(3), [random_ids(2), random_ids(1), random_ids(9)], row_id=2),
        ]
    )


def logps_and_gradients(model, batch):
    model.zero_grad()
    logps = sum_by_sequence(model(batch).logprobs, batch.target_lengths)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, reference, batch, tolerance=1e-5):
    logps, gradients = logps_and_gradients(model, batch)
    expected, expected_gradients = logps_and_gradients(reference, batch)
    torch.testing.assert_close(logps, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    norm = sum(g.square().sum() for g in expected_gradients.values()).sqrt()
    gap = sum((gradients[n] - g).square().sum() for n, g in expected_gradients.items()).sqrt()
    assert norm > 0
    assert gap / norm < tolerance


@pytest.mark.parametrize("name", SUPPORTED)
def test_packed_equals_padded(name, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a fallback to padded would warn
        model = LanguageModel(tiny(name))
    assert model.layout == "shared_prefix", model.layout_reason
    assert_same(model, LanguageModel(tiny(name), layout="padded"), batch)


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("name", ["LlamaConfig", "Gemma2Config", "MistralConfig", "GptOssConfig"])
@pytest.mark.parametrize(("learned", "flags"), [(1, [1, 0, 1, 1, 0, 0]), (2, [1, 1, 1, 1, 1, 0])])
def test_completions_that_are_not_learnt_from(layout, name, learned, flags, batch):
    """The values are the same; the gradient is that of the others."""
    model = LanguageModel(tiny(name), layout=layout)
    assert model.layout == layout
    weights = torch.linspace(1, 2, len(batch.targets))

    def run(weights, **how):
        model.zero_grad()
        tokens = model(batch, with_entropy=True, with_collision=True, **how)
        (weights * tokens.logprobs).sum().backward()
        return tokens, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    counts = torch.tensor(flags).repeat_interleave(batch.target_lengths)
    expected, all_learnt = run(weights)
    masked = run(weights * counts)[1]
    found, gradient = run(weights, learned=learned)
    torch.testing.assert_close(found.logprobs, expected.logprobs)
    for one, other in ((found.entropy, expected.entropy), (found.log_collision, expected.log_collision)):
        torch.testing.assert_close(one[counts.bool()], other[counts.bool()])
        assert one[~counts.bool()].isnan().all()
    assert (gradient - masked).norm() < 1e-5 * masked.norm()
    assert (all_learnt - masked).norm() > 0.1 * masked.norm()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_ignores_the_layout_falls_back_with_one_warning(name, batch):
    with pytest.warns(UserWarning, match="runs in the padded layout") as caught:
        model = LanguageModel(tiny(name))
    assert len([w for w in caught if "padded layout" in str(w.message)]) == 1
    assert model.layout == "padded"
    assert model(batch).logprobs.isfinite().all()


@pytest.mark.parametrize("name", ["LlamaConfig", "Gemma2Config", "MistralConfig"])
def test_gradient_checkpointing_keeps_the_plan(name, batch):
    model = prepare(tiny(name), Policy("", gradient_checkpointing=True)).train()
    assert_same(model, LanguageModel(tiny(name), layout="padded"), batch)


def test_lora_on_every_linear_layer(batch):
    torch.manual_seed(0)
    model = prepare(
        tiny("LlamaConfig"), Policy("", lora=LoRA(r=2, target_modules=["q_proj", "lm_head", "down_proj"]))
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    reference = prepare(
        tiny("LlamaConfig"),
        Policy("", lora=LoRA(r=2, target_modules=["q_proj", "lm_head", "down_proj"]), layout="padded"),
    )
    reference.load_state_dict(model.state_dict())
    assert_same(model, reference, batch, tolerance=2e-5)


def test_bfloat16_within_its_precision(batch):
    model, reference = (
        LanguageModel(tiny("LlamaConfig").bfloat16()),
        LanguageModel(tiny("LlamaConfig"), layout="padded"),
    )
    gap = (model(batch).logprobs - reference(batch).logprobs).abs()
    assert gap.mean() < 0.05
    assert model(batch).logprobs.dtype == torch.float32


def test_the_same_object_still_generates():
    model, plain = LanguageModel(tiny("Gemma2Config")), tiny("Gemma2Config")
    prompt = torch.randint(3, VOCABULARY, (2, 9))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert (
        model.eval().model.generate(prompt, **settings) == plain.eval().generate(prompt, **settings)
    ).all()


def test_longrope_uses_padded_past_the_original_context(batch):
    model = LanguageModel(tiny("LlamaConfig"))
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 12}
    assert model.layout_of(batch) == "padded"
    assert model.layout_of(pack([PromptGroup([3, 4], [[5]])])) == "shared_prefix"


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-2.0, 0.0, 1.0, 3.0])])
def test_flex_equals_segments(batch, window, softcap, sinks):
    query, key, value = (
        torch.randn(1, 4, len(batch.input_ids), 8),
        *torch.randn(2, 1, 2, len(batch.input_ids), 8),
    )
    outputs = [
        A.shared_prefix_attention(
            torch.nn.Identity(),
            query,
            key,
            value,
            None,
            sliding_window=window,
            softcap=softcap,
            s_aux=sinks,
            shared_prefix=A.SharedPrefixPlan(batch.segments, batch.position_ids, backend=backend),
        )[0]
        for backend in ("segments", "flex")
    ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_flex_and_varlen_after_a_forward_before(batch, window):
    """The second forward gives every completion that it holds what one forward over the whole row gives it."""
    query, key, value = torch.randn(3, 1, 2, len(batch.input_ids), 8)
    layer = torch.nn.Identity()

    def attend(plan, tokens=slice(None)):
        tensors = (tensor[:, :, tokens] for tensor in (query, key, value))
        how = {"sliding_window": window, "shared_prefix": plan}
        return A.shared_prefix_attention(layer, *tensors, None, **how)[0]

    whole = attend(A.SharedPrefixPlan(batch.segments, batch.position_ids))
    first, others = batch.parts(1)
    plan = A.SharedPrefixPlan(first.segments, batch.position_ids[first.tokens], kept={})
    torch.testing.assert_close(attend(plan, first.tokens), whole[:, first.tokens])
    for backend in ("segments", "flex"):
        following = A.SharedPrefixPlan(
            others.segments, batch.position_ids[others.tokens], after=plan, backend=backend
        )
        torch.testing.assert_close(attend(following, others.tokens), whole[:, others.tokens])


FLEX = ["LlamaConfig", "Qwen3Config", "MistralConfig", "Gemma2Config", "Gemma3TextConfig", "GptOssConfig"]


def wide(name):
    """With heads as wide as FlexAttention needs them on CUDA."""
    model = tiny(name, head_dim=A.MIN_FLEX_HEAD_DIM)
    assert model.get_submodule("model.layers.0.self_attn").head_dim == A.MIN_FLEX_HEAD_DIM
    return model


@pytest.mark.parametrize("name", FLEX)
@torch.no_grad()  # FlexAttention has no backward on a CPU
def test_flex_equals_padded(name, batch, monkeypatch):
    model = LanguageModel(wide(name))  # probed by segments
    monkeypatch.setattr(A, "choose_backend", lambda *args, **kwargs: "flex")
    expected = LanguageModel(wide(name), layout="padded")(batch).logprobs
    torch.testing.assert_close(model(batch).logprobs, expected, atol=1e-5, rtol=1e-5)


def test_the_varlen_plan_by_hand():
    batch = pack([PromptGroup([1, 2], [[3], [4, 5]]), PromptGroup([6], [[7]])])
    plan = A.SharedPrefixPlan(batch.segments, batch.position_ids)
    index, queries, keys, longest_query, longest_key = plan.varlen
    assert index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert queries.tolist() == [0, 3, 5, 7]
    assert keys.tolist() == [0, 3, 7, 9]
    assert (longest_query, longest_key) == (3, 4)


def test_varlen_keys_and_offsets_give_the_segments_result(batch):
    """The CUDA kernel's contract, computed by its definition: causal, aligned to the last query and key."""
    plan = A.SharedPrefixPlan(batch.segments, batch.position_ids)
    index, queries, keys, *_ = plan.varlen
    query, key, value = torch.randn(3, 1, 2, len(batch.input_ids), 8)
    expected, _ = A.shared_prefix_attention(torch.nn.Identity(), query, key, value, None, shared_prefix=plan)
    gathered = key[:, :, index], value[:, :, index]
    for q, q_end, k, k_end in zip(queries, queries[1:], keys, keys[1:], strict=False):
        own_key, own_value = (tensor[:, :, k:k_end] for tensor in gathered)
        mask = torch.ones(q_end - q, k_end - k, dtype=torch.bool).tril(int(k_end - k) - int(q_end - q))
        output = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, q:q_end], own_key, own_value, mask
        )
        torch.testing.assert_close(output.transpose(1, 2), expected[:, q:q_end])


AMPERE, TURING, PASCAL = (8, 0), (7, 5), (6, 1)
HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_dim", "how", "expected"),
    [
        (AMPERE, HALF, 128, {}, "varlen"),
        (AMPERE, torch.float16, 256, {}, "varlen"),
        (AMPERE, HALF, 288, {}, "flex"),
        (AMPERE, torch.float32, 128, {}, "flex"),
        (AMPERE, HALF, 128, {"plain": False}, "flex"),
        (AMPERE, HALF, 128, {"dropout": True}, "segments"),
        (AMPERE, torch.float32, 8, {}, "segments"),
        (TURING, torch.float16, 128, {}, "flex"),
        (PASCAL, torch.float16, 128, {}, "segments"),
    ],
)
def test_backend_by_what_is_asked(gpu, dtype, head_dim, how, expected):
    how = {"plain": True, "dropout": False, **how}
    assert A.backend_of_cuda(gpu, dtype, head_dim, **how) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLEX)
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_cuda_backends_equal_padded(name, backend, batch, monkeypatch):
    """Values in bfloat16 within its precision; by flex also in float32, gradients included, to 1e-5."""
    capped = name in ("Gemma2Config", "GptOssConfig")
    if backend == "varlen" and capped:
        pytest.skip("varlen has neither soft cap nor sinks: flex serves this model")
    batch = batch.to("cuda")
    dtypes = (torch.bfloat16,) if backend == "varlen" else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        model = LanguageModel(wide(name).to("cuda", dtype))
        reference = LanguageModel(wide(name).to("cuda", dtype), layout="padded")
        monkeypatch.setattr(A, "choose_backend", lambda *args, **kwargs: backend)
        if dtype == torch.float32:
            assert_same(model, reference, batch)
        gap = (model(batch).logprobs - reference(batch).logprobs).abs()
        assert gap.mean() < 0.05
        monkeypatch.undo()
