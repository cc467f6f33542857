from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.functional import sum_by_sequence
from lightning_rlhf.models import LoRA, Policy, Quantization, load_language_model
from lightning_rlhf.models import checkpointing as C
from lightning_rlhf.models.adapters import copy_adapter
from tests.models.families import tiny

BATCH = pack([PromptGroup([5, 6, 7], [[8, 9, 10], [11]]), PromptGroup([12], [[13, 14], [15, 16]])])
SETTINGS = {
    "full": {},
    "lora": {"lora": LoRA(r=2)},
    "nf4": {"lora": LoRA(r=2), "quantization": Quantization(compute_dtype="float32")},
    "int8": {"lora": LoRA(r=2), "quantization": Quantization(bits=8)},
    "padded": {"layout": "padded"},
}
KINDS = [
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": "selective"},
    {"gradient_checkpointing": True, "offload_activations": True},
    {"gradient_checkpointing": "selective", "offload_activations": True},
]
NAMES = ["all", "selective", "all, offloaded", "selective, offloaded"]


class Ops(TorchDispatchMode):
    """Count what is computed."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def offloaded(monkeypatch):
    """As on a GPU: everything that is not a weight is moved; the sizes of what was."""
    sizes = []

    def to_host(tensor):
        sizes.append(tensor.nbytes)
        return tensor.clone()

    monkeypatch.setattr(C, "SMALLEST_OFFLOADED", 0)
    monkeypatch.setattr(C, "pinned_copy", to_host)
    return sizes


def load(path, **settings):
    """The same model every time, its adapter away from where it does nothing."""
    torch.manual_seed(0)
    model = load_language_model(Policy(path, **settings)).train()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    return model


def gradient(model, loss=lambda model: (sum_by_sequence(model(BATCH).logprobs, BATCH.target_lengths)).sum()):
    model.zero_grad()
    loss(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_gradient_is_that_without(llama_dir, settings, kind, offloaded):
    expected = gradient(load(llama_dir, **SETTINGS[settings]))
    found = gradient(load(llama_dir, **SETTINGS[settings], **kind))
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert bool(offloaded) is ("offload_activations" in kind)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_every_role_is_computed_again_as_itself(llama_dir, kind, offloaded):
    """Two adapters of one base in one backward, which runs outside of both roles."""

    def loss(model):
        with model.role("value"):
            other = model(BATCH).logprobs.sum()
        return model(BATCH).logprobs.sum() + 2 * other

    def roles(**how):
        model = load(llama_dir, lora=LoRA(r=2), **how)
        copy_adapter(model.model, "value", trainable=True)
        for name, parameter in model.named_parameters():
            if ".value." in name:
                parameter.data += 0.1
        return model

    expected, found = (gradient(roles(**how), loss) for how in ({}, kind))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_selective_computes_no_product_with_the_weights_again(llama_dir):
    counts = {}
    for kind in (False, True, "selective"):
        model = load(llama_dir, lora=LoRA(r=2), gradient_checkpointing=kind)
        with Ops() as ops:
            gradient(model)
        counts[kind] = ops.count
    layers, products = (
        model.config.num_hidden_layers,
        {kind: count["aten::mm"] for kind, count in counts.items()},
    )
    # 7 linear layers, each a product with W, A and B; the last one of a layer is never needed again. And 6 in the
    # backward: checkpointing asks for the gradient of the embeddings.
    assert products[True] - products[False] == layers * (3 * 7 - 1) + 6
    # B of the wide layers: of q, o, gate and up.
    assert products["selective"] - products[False] == layers * 4 + 6
    attention = {
        kind: count["aten::_scaled_dot_product_flash_attention_for_cpu"] for kind, count in counts.items()
    }
    assert attention["selective"] == attention[False] < attention[True]


def test_only_the_input_of_each_layer_is_offloaded(llama_dir, offloaded):
    model = load(llama_dir, gradient_checkpointing=True, offload_activations=True)
    gradient(model)
    hidden = 4 * len(BATCH.input_ids) * model.config.hidden_size
    assert offloaded.count(hidden) >= model.config.num_hidden_layers
    weights = {p.nbytes for p in model.parameters() if p.ndim == 2}
    assert not weights & set(offloaded)


def test_what_is_small_or_in_host_memory_stays():
    memory = C.HostMemory()
    large = torch.zeros(C.SMALLEST_OFFLOADED)
    for tensor in (large, large[:2]):
        assert memory._pack(tensor) == (None, tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_on_a_gpu(llama_dir, kind, monkeypatch):
    monkeypatch.setattr(C, "SMALLEST_OFFLOADED", 0)
    nf4 = {"lora": LoRA(r=2), "quantization": Quantization(compute_dtype="float32")}
    batch = BATCH.to("cuda")
    loss = lambda model: model(batch).logprobs.sum()  # noqa: E731
    expected, found = (gradient(load(llama_dir, **nf4, **how).to("cuda"), loss) for how in ({}, kind))
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_checkpointing": "some"}, "must be true, false or selective"),
        ({"offload_activations": True}, "set policy.gradient_checkpointing: true as well"),
    ],
)
def test_slips_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Policy("a/model", **settings)


@pytest.mark.parametrize("name", ["Gemma2Config", "GptOssConfig", "GPT2Config"])
def test_what_other_families_compute_in_place_is_not_kept(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    expected, found = (
        gradient(load(str(tmp_path), gradient_checkpointing=kind)) for kind in (False, "selective")
    )
    assert (found - expected).norm() <= 1e-6 * expected.norm()
