import pytest
import torch
from peft import PeftModel

from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.functional import sum_by_sequence
from lightning_rlhf.models import (
    LanguageModel,
    LoRA,
    Policy,
    Quantization,
    Reference,
    load_language_model,
    load_tokenizer,
)
from lightning_rlhf.models.language_model import disable_dropout
from tests.models.families import tiny

BATCH = pack([PromptGroup([5, 6, 7], [[8, 9, 10], [11]]), PromptGroup([12], [[13, 14], [15, 16]])])
NF4 = Quantization(compute_dtype="float32")


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def logps(model):
    return sum_by_sequence(model(BATCH).logprobs, BATCH.target_lengths)


def test_full_fine_tuning_is_float32_and_trains_everything(llama_dir):
    model = load_language_model(Policy(llama_dir))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(trainable(model)) == len(list(model.named_parameters()))


def test_lora_trains_the_adapter_only_in_float32(llama_dir):
    model = load_language_model(Policy(llama_dir, dtype="bfloat16", lora=LoRA(r=2)))
    assert trainable(model)
    assert all("lora_" in name for name in trainable(model))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}


def test_adapters_survive_a_cast_of_the_module(llama_dir):
    model = load_language_model(Policy(llama_dir, lora=LoRA(r=2)))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    torch.nn.ModuleDict({"policy": model}).to(torch.bfloat16)
    after = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert all(after[n].dtype == torch.float32 and torch.equal(after[n], p) for n, p in before.items())
    assert model.causal_lm.dtype == torch.bfloat16


def test_goes_on_from_an_adapter_directory(llama_dir, tmp_path):
    model = load_language_model(Policy(llama_dir, lora=LoRA(r=2)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.model.save_pretrained(tmp_path / "adapter")
    again = load_language_model(Policy(str(tmp_path / "adapter")))
    assert isinstance(again.model, PeftModel)
    torch.testing.assert_close(logps(again), logps(model))
    assert trainable(again) == trainable(model)
    with pytest.raises(ValueError, match="is an adapter already"):
        load_language_model(Policy(str(tmp_path / "adapter"), lora=LoRA()))
    reference = Reference(again)
    assert reference.kind == "adapter"
    torch.testing.assert_close(reference(BATCH), logps(again))


def test_missing_model_names_it_and_a_remedy():
    with pytest.raises(FileNotFoundError, match="no model at 'no/such'.*hf download no/such"):
        load_language_model(Policy("no/such"))
    with pytest.raises(FileNotFoundError, match="no tokenizer at 'no/such'"):
        load_tokenizer("no/such")


def test_quantised_weights_need_an_adapter(llama_dir):
    with pytest.raises(ValueError, match="give policy.lora as well"):
        load_language_model(Policy(llama_dir, quantization=NF4))


@pytest.mark.parametrize("settings", [{"r": 0}, {"dropout": 1.0}])
def test_refuses_slips_in_lora(settings):
    with pytest.raises(ValueError, match="lora"):
        LoRA(**settings)


# --- 4 and 8 bits -----------------------------------------------------------------------------------------------------


def bits(model):
    """The stored bytes: packed 4-bit weights, seen as numbers, hold nan, which never equals itself."""
    tensors = {n: v for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    return {n: v.detach().reshape(-1).contiguous().view(torch.uint8).tolist() for n, v in tensors.items()}


@pytest.mark.parametrize("quantization", [NF4, Quantization(bits=8)])
def test_quantised_lora_has_gradients(llama_dir, quantization):
    model = load_language_model(Policy(llama_dir, lora=LoRA(r=2), quantization=quantization))
    logps(model).sum().backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert gradients
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_an_evaluation_does_not_change_4_bit_gradients(llama_dir):
    """bitsandbytes repacks 4-bit layers on some processors in any no-grad forward in eval mode."""

    def gradient():
        model.zero_grad()
        logps(model).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.manual_seed(0)
    quantization = Quantization(compute_dtype="bfloat16")
    model = load_language_model(Policy(llama_dir, lora=LoRA(r=2), quantization=quantization))
    disable_dropout(model)
    before = gradient()
    state = bits(model)
    model.eval()
    with torch.no_grad():
        model(BATCH)
        model.model.generate(input_ids=BATCH.input_ids[None, :3], max_new_tokens=3, pad_token_id=0)
    model.train()
    assert torch.equal(gradient(), before)
    assert bits(model) == state


# --- roles and references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "kind"), [(LoRA(r=2, dropout=0.5), "base"), (None, "model")])
def test_the_reference_equals_the_untrained_policy(llama_dir, lora, kind):
    model = load_language_model(Policy(llama_dir, lora=lora))
    disable_dropout(model)
    reference = Reference(model)
    assert reference.kind == kind
    assert torch.equal(reference(BATCH), logps(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.1)
    assert not torch.allclose(reference(BATCH), logps(model), atol=1e-2)
    assert not any(p.requires_grad for p in reference.parameters())


def test_a_role_switches_the_adapter_and_never_requires_grad(llama_dir):
    model = load_language_model(Policy(llama_dir, lora=LoRA(r=2)))
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    base = logps(LanguageModel(tiny("LlamaConfig")))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with model.role(None):
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
        torch.testing.assert_close(logps(model), base)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not torch.allclose(logps(model), base, atol=1e-2)


def test_the_role_ends_with_an_exception(llama_dir):
    model = load_language_model(Policy(llama_dir, lora=LoRA(r=2)))
    expected = logps(model)
    with pytest.raises(RuntimeError, match="in between"), model.role(None):
        raise RuntimeError("in between")
    torch.testing.assert_close(logps(model), expected)


def test_an_initialisation_that_changes_the_base_has_no_implicit_reference(llama_dir):
    model = load_language_model(Policy(llama_dir, lora=LoRA(r=2, init="pissa")))
    with pytest.raises(ValueError, match="'pissa' changes the base"):
        Reference(model)


def test_dropout_off_and_checkpointing_on(llama_dir):
    policy = Policy(llama_dir, lora=LoRA(r=2, dropout=0.5), gradient_checkpointing=True)
    model = load_language_model(policy).train()
    disable_dropout(model)
    assert torch.equal(logps(model), logps(model))
    assert model.training


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"layout": "shared"},
            ValueError,
            "policy.layout is 'shared'; it must be one of shared_prefix, padded",
        ),
        ({"dtype": "bf16"}, ValueError, "policy.dtype is 'bf16'; it must be one of auto, float32"),
        ({"lora": {"r": 2}}, TypeError, r"policy.lora must be LoRA settings, got dict: write LoRA\("),
    ],
)
def test_slips_in_the_policy_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        Policy("a/model", **settings)


def test_a_model_in_an_unknown_layout_is_refused():
    """It would be packed without the attention that keeps completions apart: wrong numbers, without a word."""
    with pytest.raises(ValueError, match="layout is 'shared'; it must be one of shared_prefix, padded"):
        LanguageModel(tiny("LlamaConfig"), layout="shared")
