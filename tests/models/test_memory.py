import pytest
import torch
from torch import nn

from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.models import LoRA, Policy, Quantization, load_language_model
from lightning_rlhf.models.attention import causal_mask
from lightning_rlhf.models.memory import GRADIENTS, MemoryLedger, moments_bytes
from lightning_rlhf.models.skeleton import skeleton
from tests.tokenizers import letters

BATCH = pack([PromptGroup([5, 6, 7], [[8, 9], [4]]), PromptGroup([5], [[6, 7, 8], [9, 4]])])
SETTINGS = {
    "full": {},
    "lora": {"lora": LoRA(r=4)},
    "dora": {"lora": LoRA(r=4, use_dora=True)},
    "bf16": {"lora": LoRA(r=4), "dtype": "bfloat16"},
    "nf4": {"lora": LoRA(r=4), "quantization": Quantization(compute_dtype="float32")},
    "nf4 single": {"lora": LoRA(r=4), "quantization": Quantization(double_quant=False)},
    "int8": {"lora": LoRA(r=4), "quantization": Quantization(bits=8)},
}


def sizes(model):
    """Bytes of every parameter, and whether it is trained; without the number of those that were quantised."""
    return {n: (p.untyped_storage().nbytes(), p.requires_grad) for n, p in model.named_parameters()}


def held(policy):
    model, ledger = skeleton(policy), MemoryLedger(97)
    ledger.hold(model, lambda name: "adapter" if ".lora_" in name else "base")
    return model, ledger


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_skeleton_has_the_parameters_of_the_model(llama_dir, kind):
    policy = Policy(llama_dir, **SETTINGS[kind])
    model, ledger = held(policy)
    assert sizes(model) == sizes(load_language_model(policy))
    assert ledger.live["adapter"] == sum(n for name, (n, _) in sizes(model).items() if ".lora_" in name)


def test_nf4_with_double_quantisation_takes_four_bits_and_an_eighth(tmp_path):
    """Dettmers et al. (2023), section 3: 8/64 + 32/(64 · 256) = 0.127 bits a weight for the scales."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(vocab_size=8, tie_word_embeddings=False, **shape).save_pretrained(tmp_path)
    bits = {}
    for double in (True, False):
        quantization = Quantization(double_quant=double, compute_dtype="float32")
        model, ledger = held(Policy(str(tmp_path), lora=LoRA(r=1), quantization=quantization))
        linear = 2 * 7 * 512 * 512
        others = 4 * (2 * 8 * 512 + 5 * 512) + sum(b.nbytes for b in model.buffers())
        bits[double] = 8 * (ledger.live["base"] - others) / linear
    assert bits[True] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    assert bits[False] == pytest.approx(4 + 32 / 64, abs=1e-3)


def test_an_adapter_directory_is_trained_further(llama_dir, tmp_path):
    policy = Policy(llama_dir, lora=LoRA(r=4))
    load_language_model(policy).model.save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    model, _ = held(Policy(str(tmp_path)))
    assert sizes(model) == sizes(load_language_model(Policy(str(tmp_path))))


def test_what_a_forward_keeps_is_what_autograd_saves(llama_dir):
    """The bytes that the ledger counts beside those that autograd hands to a hook, in a model with data."""
    policy = Policy(llama_dir)
    model, ledger = held(policy)
    with ledger.fake():
        kept = model(ledger.without_data(BATCH)).logprobs
    counted = ledger.live["activations"] + ledger.live["logits"]
    real, saved = load_language_model(policy), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        also_kept = real(BATCH).logprobs
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    expected = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in weights)
    # Besides what autograd saves there are results, position ids and the batch itself: of tokens, not of layers.
    assert counted == pytest.approx(expected, rel=0.05)
    assert kept.shape == also_kept.shape


def test_a_peak_by_hand():
    """exp of 1,000 numbers and its sum: the backward needs y, makes a gradient of 1, and multiplies both."""
    ledger = MemoryLedger()
    with ledger.fake():
        x = torch.zeros(1000, requires_grad=True)
        ledger.mark([x], "weights")
        y = x.exp()
        assert ledger.live == {"weights": 4000, "activations": 4000}
        z = y.sum()
        del y  # the backward of exp keeps it
        assert ledger.live["activations"] == 4004
        z.backward()
    assert ledger.peak.parts == {"weights": 4000, "activations": 4004 + 4 + 4000}
    assert ledger.live["activations"] == 4 + 4000  # z, and the gradient, which nothing said is one


def test_gradients_are_booked_as_such():
    ledger = MemoryLedger()
    with torch.device("meta"):
        layer = nn.Linear(10, 10, bias=False)
    ledger.hold(layer, lambda name: "weights")
    ledger.watch_gradients(layer)
    with ledger.fake():
        layer(torch.zeros(3, 10)).sum().backward()
    assert (ledger.live["weights"], ledger.live[GRADIENTS]) == (400, 400)


def test_tied_weights_are_counted_once():
    ledger = MemoryLedger()
    with torch.device("meta"):
        one, other = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
    other.weight = one.weight
    both = nn.ModuleList([one, other])
    ledger.hold(both, lambda name: "weights")
    assert ledger.live["weights"] == 400
    assert both[0].weight is both[1].weight


def test_computing_without_data_leaves_nothing_behind(llama_dir):
    """Masks are cached for the next layer; one without data would break the next real batch."""
    policy = Policy(llama_dir, lora=LoRA(r=2), quantization=Quantization(compute_dtype="float32"))
    real = load_language_model(policy)
    before = real(BATCH).logprobs
    model, ledger = held(policy)
    with ledger.fake():
        model(ledger.without_data(BATCH)).logprobs.sum().backward()
    assert causal_mask.cache_info().currsize == 0
    assert torch.equal(real(BATCH).logprobs, before)
    assert torch.equal(load_language_model(policy)(BATCH).logprobs, before)  # a fresh adapter changes nothing


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd"])
def test_moments_are_those_that_an_optimizer_keeps(name):
    from lightning_rlhf.algorithms.optimization import Optimization, build_optimizer

    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(300, 100), nn.Linear(7, 5))
    optimizer = build_optimizer(layers.named_parameters(), Optimization(name=name))
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = {"qmap1", "qmap2", "step"}
    kept = sum(
        tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and key not in tables
    )
    assert moments_bytes(name, [p.numel() for p in layers.parameters()]) == (kept, 0)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer is 'lion'; it must be one of adamw"):
        moments_bytes("lion", [1])
