import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.generation import Sampling, generate
from lightning_rlhf.models import LanguageModel, LoRA, Policy, Quantization, Reference, load_language_model
from lightning_rlhf.models.adapters import copy_adapter
from lightning_rlhf.models.compilation import compile_layers
from lightning_rlhf.models.critic import Critic
from tests.models.families import tiny
from tests.tokenizers import letters

BATCHES = [
    pack([PromptGroup([5, 6, 7], [[8, 9, 10], [11]]), PromptGroup([12], [[13, 14], [15, 16]])]),
    pack([PromptGroup([5, 6, 7, 9, 4], [[8, 9, 10, 4, 4, 4, 4], [11, 12]])]),
    pack([PromptGroup([5, 6], [[8, 9], [11, 5, 6, 7], [3]]), PromptGroup([12, 4], [[13]])]),
]
SETTINGS = {
    "full": {},
    "lora": {"lora": LoRA(r=2)},
    "nf4": {"lora": LoRA(r=2), "quantization": Quantization(compute_dtype="float32")},
    "lora, checkpointed": {"lora": LoRA(r=2), "gradient_checkpointing": True},
    "padded": {"layout": "padded"},
}
CACHED = 4
"""Frames and graphs of one kind of forward: norms, attention in two halves, MLP."""


@pytest.fixture(autouse=True)
def fresh():
    """No compilation of other tests, nor for them."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def load(path, backend=None, **settings):
    """The same model every time, its adapter away from where it does nothing."""
    torch.manual_seed(0)
    model = load_language_model(Policy(path, **settings)).train()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if backend is not None:
        compile_layers(model, backend)
    return model


def gradient(model, batch):
    """Of a loss that weighs completions by what the base says, as a role without gradient."""
    model.zero_grad()
    now = model(batch).logprobs
    with torch.no_grad(), model.role(None):
        before = model(batch).logprobs
    (now * before).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_are_those_without_and_lengths_compile_nothing_again(llama_dir, settings):
    plain, compiled = load(llama_dir, **settings), load(llama_dir, "eager", **settings)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    made = []
    for batch in BATCHES:
        expected, found = gradient(plain, batch), gradient(compiled, batch)
        assert expected.norm() > 0
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        made.append(graphs())
    assert made[0] >= CACHED
    assert made == made[:1] * len(BATCHES)


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="there is no C++ compiler, which PyTorch compiles with"
)
def test_what_is_compiled_to_machine_code_gives_the_same(llama_dir):
    plain, compiled = load(llama_dir), load(llama_dir, compile=True, gradient_checkpointing=True)
    assert compiled.compiled_by == "inductor"
    expected, found = gradient(plain, BATCHES[0]), gradient(compiled, BATCHES[0])
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert graphs() >= CACHED


def test_every_role_is_compiled_and_computed_as_itself(llama_dir):
    def of_roles(model):
        copy_adapter(model.model, "value", trainable=True)
        for name, parameter in model.named_parameters():
            if ".value." in name:
                parameter.data += 0.1
        with model.role("value"):
            other = model(BATCHES[0]).logprobs.sum()
        (model(BATCHES[0]).logprobs.sum() + 2 * other).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = of_roles(load(llama_dir, lora=LoRA(r=2)))
    found = of_roles(load(llama_dir, "eager", lora=LoRA(r=2)))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_sampling_is_left_uncompiled(llama_dir):
    model = load(llama_dir, "eager")
    prompts, how = [[5, 6, 7], [8]], Sampling(max_new_tokens=5, num_samples=2)
    found = list(generate(model, letters(), prompts, how, seeds=[1, 2]))
    assert graphs() == 0
    assert found == list(generate(load(llama_dir), letters(), prompts, how, seeds=[1, 2]))
    model(BATCHES[0])
    assert graphs() > 0


def test_copies_are_compiled_as_well(llama_dir):
    policy = load(llama_dir, "eager")
    reference, critic = Reference(policy), Critic(policy)
    for model in (reference.model, critic.model):
        assert model.compiled_by == "eager"
        before = graphs()
        torch._dynamo.reset()
        model.hidden_states(BATCHES[0])
        assert graphs() > before


def test_what_cannot_be_compiled_is_refused(llama_dir):
    with pytest.raises(ValueError, match="policy.compile.*selective.*set that to true or false"):
        Policy(llama_dir, compile=True, gradient_checkpointing="selective")
    kept, compiled = load(llama_dir, gradient_checkpointing="selective"), load(llama_dir, "eager")
    with pytest.raises(ValueError, match="selective.*compilation would merge these"):
        compile_layers(kept)
    with pytest.raises(ValueError, match="leave selective out"):
        compiled.enable_gradient_checkpointing(selective=True)
    model = LanguageModel(tiny("LlamaConfig"))
    model.causal_lm._no_split_modules = None
    with pytest.raises(ValueError, match="does not say what its layers are.*policy.compile: false"):
        compile_layers(model)
