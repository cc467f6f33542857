from functools import lru_cache

import pytest
import torch
from transformers import LlamaConfig

from lightning_rlhf.algorithms.footprint import RewardRole, Training, forecast
from lightning_rlhf.algorithms.footprint.phases import Step
from lightning_rlhf.generation import Sampling
from lightning_rlhf.generation.prefill import SPARE
from lightning_rlhf.models import LoRA, Policy, Quantization, load_language_model
from lightning_rlhf.models.memory import MemoryLedger

LAYERS, HEADS, WIDTH, VOCABULARY = 2, 2, 16, 97
FULL = {"groups": 3, "prompt": 6, "completion": 4}
LORA = LoRA(r=2)
PPO = {"minibatch": 4, "micro_batch": 2, "has_reference": True, "has_critic": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The configuration of a model, and no weights."""
    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return str(folder)


known = lru_cache(forecast)


def found(path, algorithm, policy=None, **settings):
    return known(Training(algorithm, policy or Policy(path), **{**FULL, **settings}))


def weights(path):
    return found(path, "SFT").parts["policy"]


def test_only_configurations_are_read(path):
    with pytest.raises(FileNotFoundError, match="no model at"):
        load_language_model(Policy(path))
    assert weights(path) > 0


def test_full_fine_tuning_takes_four_times_the_weights(path):
    parts = found(path, "SFT").phases[-1].peak
    trainable = 4 * found(path, "SFT").trainable
    buffers = parts.parts["policy"] - trainable
    assert 0 <= buffers < 200  # rotary frequencies
    assert parts.parts["optimizer"] == 2 * trainable
    assert parts.most["gradients"] == trainable


def test_the_reference_costs_what_it_is(path):
    own = found(path, "DPO", completions=2, has_reference=True)
    none = found(path, "DPO", completions=2)
    assert own.parts["reference"] == own.parts["policy"]
    assert own.total - none.total == own.parts["reference"]
    on_base = found(path, "DPO", Policy(path, lora=LORA), completions=2, has_reference=True)
    assert "reference" not in on_base.parts
    assert [phase.name for phase in on_base.phases] == ["reference", "forward and backward"]
    other = found(
        path, "DPO", Policy(path, lora=LORA), completions=2, has_reference=True, reference=Policy(path)
    )
    assert other.parts["reference"] == weights(path)


def test_a_reference_that_follows_a_fresh_adapter_is_a_copy_of_it(path):
    settings = {"has_reference": True, "sampling": Sampling(max_new_tokens=4, num_samples=2)}
    parts = found(path, "OnlineDPO", Policy(path, lora=LORA), reference_follows=True, **settings).parts
    assert parts["reference adapter"] == parts["policy adapter"] > 0


def test_checkpointing_keeps_no_layers(path):
    deep = found(path, "SFT", prompt=100, completion=100).worst.peak.most["activations"]
    policy = Policy(path, gradient_checkpointing=True)
    shallow = found(path, "SFT", policy, prompt=100, completion=100).worst.peak.most["activations"]
    assert shallow < 0.6 * deep


def test_what_is_offloaded_is_in_the_hosts_memory(path):
    long = {"groups": 16, "prompt": 100, "completion": 100}
    on_device, offloaded = (
        found(path, "SFT", Policy(path, gradient_checkpointing=True, offload_activations=where), **long)
        for where in (False, True)
    )
    inputs = 16 * 200 * HEADS * WIDTH * 4
    assert on_device.offloaded == 0
    assert LAYERS * inputs <= offloaded.offloaded <= (LAYERS + 4) * inputs
    # One layer's input is back while the layer is computed again.
    assert offloaded.total < on_device.total - 0.9 * (LAYERS - 1) * inputs
    assert "host memory" not in offloaded.parts


def test_selective_checkpointing_keeps_the_costly_part(path):
    totals = [
        found(path, "SFT", Policy(path, gradient_checkpointing=kind), prompt=100, completion=100).total
        for kind in (True, "selective", False)
    ]
    assert totals == sorted(set(totals))


def test_mixed_precision_casts_what_it_computes_with(path):
    long = {"prompt": 300, "completion": 300}
    whole, mixed = (
        found(path, "SFT", precision=p, **long).worst.peak.most for p in ("32-true", "bf16-mixed")
    )
    assert mixed["policy"] == whole["policy"]
    assert mixed["activations"] < 0.8 * whole["activations"]


def test_true_half_precision_leaves_adapters_in_float32(path):
    whole, half = (
        found(path, "SFT", Policy(path, lora=LORA), precision=p).parts for p in ("32-true", "bf16-true")
    )
    assert half["policy adapter"] == whole["policy adapter"]
    assert half["policy"] == pytest.approx(whole["policy"] / 2)


def test_logits_are_those_of_a_chunk_and_their_gradient(path, monkeypatch):
    rows = 3 * 4
    assert found(path, "SFT").worst.peak.most["logits"] >= 2 * rows * VOCABULARY * 4
    monkeypatch.setattr("lightning_rlhf.models.language_model.LOGITS_AT_A_TIME", 4 * VOCABULARY)
    chunked = forecast(Training("SFT", Policy(path), **FULL)).worst.peak.most["logits"]
    assert 2 * 4 * VOCABULARY * 4 <= chunked < 2 * rows * VOCABULARY * 4


def test_only_what_is_learnt_from_keeps_its_logits(path):
    both = found(path, "KTO", completions=2, has_reference=True)
    half = found(path, "KTO", completions=2, has_reference=True, learned=1)
    assert half.worst.peak.most["logits"] < both.worst.peak.most["logits"]


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize(("completion", "room"), [(4, SPARE), (SPARE - 5, SPARE), (SPARE - 4, 2 * SPARE)])
def test_the_cache_holds_every_sample_and_spare_tokens(path, num_samples, completion, room):
    sampling = Sampling(max_new_tokens=completion, num_samples=num_samples, batch_size=2)
    phase = found(path, "PPO", sampling=sampling, **{**PPO, "completion": completion}).phases[0]
    # Prompt (6) and completion but for the last token, which nothing follows, rounded up; 2 prompts at a time.
    entry = 2 * num_samples * HEADS * room * WIDTH * 4
    assert phase.name == "generation"
    assert phase.peak.most["KV cache"] == 2 * LAYERS * entry


def test_a_cache_that_grows_is_copied_layer_by_layer(path):
    """The most there is beside the rest: the old and the new keys and values of one layer."""
    totals = []
    for completion in (SPARE - 5, SPARE - 4):
        sampling = Sampling(max_new_tokens=completion, batch_size=2)
        how = {**PPO, "completion": completion, "sampling": sampling}
        totals.append(found(path, "PPO", **how).phases[0].peak.total)
    entry = 2 * HEADS * SPARE * WIDTH * 4
    assert 2 * LAYERS * entry <= totals[1] - totals[0] <= 2 * (LAYERS + 1) * entry + 4_096


def test_every_role_of_ppo_is_there(path):
    reward = (RewardRole(Policy(path)),)
    own = found(path, "PPO", rewards=reward, sampling=Sampling(max_new_tokens=4), **PPO)
    parts = own.parts
    assert parts["policy"] == parts["reference"] == parts["reward model 0"] - 4 * HEADS * WIDTH
    assert parts["critic"] == parts["policy"] + 4 * (HEADS * WIDTH + 1)
    head = VOCABULARY * HEADS * WIDTH  # of the critic: it has one, and does not train it
    assert own.trainable == found(path, "SFT").trainable * 2 - head + HEADS * WIDTH + 1
    names = ["generation", "scoring", "policy and reference", "forward and backward"]
    assert [phase.name for phase in own.phases] == names


def test_roles_on_one_base_are_adapters(path):
    policy = Policy(path, lora=LORA, quantization=Quantization(compute_dtype="float32"))
    reward = (RewardRole(policy, share_base=True),)
    parts = found(path, "PPO", policy, rewards=reward, sampling=Sampling(max_new_tokens=4), **PPO).parts
    assert parts["policy adapter"] == parts["critic adapter"] == parts["reward_0 adapter"]
    assert parts["policy"] < 0.6 * weights(path)
    assert "reference" not in parts


def test_what_another_engine_samples_is_not_counted(path):
    phases = found(path, "PPO", generates=False, sampling=Sampling(max_new_tokens=4), **PPO).phases
    assert "generation" not in [phase.name for phase in phases]


def test_a_smaller_micro_batch_takes_less_and_keeps_the_gradients(path):
    long = {**PPO, "prompt": 60, "completion": 60, "generates": False}
    four, two = (found(path, "PPO", **{**long, "micro_batch": n}).phases[-1].peak.most for n in (4, 2))
    assert two["activations"] < 0.6 * four["activations"]
    assert two["gradients"] == four["gradients"]


def test_members_are_models_or_adapters(path):
    own = found(path, "RewardModel", completions=2, members=2)
    head = 4 * HEADS * WIDTH
    assert own.parts["member 1"] == own.parts["policy"] + head
    shared = found(path, "RewardModel", Policy(path, lora=LORA), completions=2, members=2)
    assert shared.parts["member_1 adapter"] == shared.parts["policy adapter"]
    assert shared.parts["member 1"] == head


def test_paged_moments_are_counted_apart(tmp_path):
    LlamaConfig(
        vocab_size=4000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    whole = found(str(tmp_path), "SFT", optimizer="paged_adamw_32bit")
    assert whole.paged == 2 * 2 * 4 * 4000 * 32  # embedding and head; the rest is too small to be paged
    assert whole.parts["optimizer"] + whole.paged == 8 * whole.trainable


def test_layouts_and_families_are_whatever_they_compute(path, tmp_path):
    shared, padded = (
        found(path, "DPO", Policy(path, layout=layout), completions=2, prompt=100, completion=10).total
        for layout in ("shared_prefix", "padded")
    )
    assert shared < padded
    from tests.models.families import tiny

    for family in ("Gemma2Config", "GPT2Config"):
        folder = tmp_path / family
        tiny(family).config.save_pretrained(folder)
        assert found(str(folder), "DPO", Policy(str(folder), lora=LORA), completions=2).total > 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_experts_are_predicted_in_every_precision(precision, tmp_path):
    from tests.models.families import tiny

    model = tiny("Qwen3MoeConfig")
    model.config.save_pretrained(tmp_path)
    parts = found(str(tmp_path), "SFT", Policy(str(tmp_path)), precision=precision).parts
    size = 2 if precision == "bf16-true" else 4
    assert parts["policy"] == pytest.approx(size * model.num_parameters(), rel=0.01)


def test_experts_that_stay_as_they_are_have_a_row_of_their_own(tmp_path):
    from tests.models.families import tiny

    model = tiny("Qwen3MoeConfig")
    model.config.save_pretrained(tmp_path)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    policy = Policy(str(tmp_path), lora=LORA, quantization=Quantization())
    parts = found(str(tmp_path), "SFT", policy).parts
    assert parts["policy, experts not quantised"] == 2 * experts > 0
    assert "policy, experts not quantised" not in found(str(tmp_path), "SFT", Policy(str(tmp_path))).parts


def test_a_model_that_needs_data_is_named(path, monkeypatch):
    """The shape of what is not 0 depends on the numbers."""
    monkeypatch.setattr(Step, "loss", lambda *_: torch.zeros(3).nonzero().sum())
    with pytest.raises(
        NotImplementedError, match="LlamaForCausalLM in 32-true cannot be computed without data"
    ):
        forecast(Training("SFT", Policy(path), **FULL))


def test_what_a_4_bit_product_uses_inside_is_counted():
    """bitsandbytes dequantises the weights in it: 1,000 columns of 64 in float32, beside 7 rows and their result."""
    from bitsandbytes import functional

    ledger = MemoryLedger()
    packed, state = functional.quantize_4bit(torch.zeros(1000, 64), quant_type="nf4")
    with ledger.fake():
        rows = torch.zeros(7, 64)
        torch.ops.bitsandbytes.gemm_4bit(rows, packed.view(-1, 1), [1000, 64], state.absmax, 64, "nf4")
    assert ledger.peak.parts["activations"] == pytest.approx(4 * (7 * 64 + 7 * 1000 + 1000 * 64), rel=0.2)
    assert ledger.peak.parts["activations"] >= 4 * (7 * 64 + 7 * 1000 + 1000 * 64)


@pytest.mark.parametrize("name", ["groups", "prompt", "completion", "members"])
def test_sizes_are_at_least_one(path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Training("SFT", Policy(path), **{name: 0})
