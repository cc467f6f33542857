"""Models of real shapes with random weights in 4 bits, made layer by layer: no more is ever in full precision."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models import LanguageModel, LoRA, Policy, Quantization
from lightning_rlhf.models.loading import lora_config, prepare
from lightning_rlhf.models.reward_directory import classifier_adapter
from lightning_rlhf.models.scorer import ScoreHead
from lightning_rlhf.models.skeleton import quantize_layers
from tests.tokenizers import letters

# Family, width, inner width, layers, heads, heads of keys, vocabulary, whether head and embedding are one.
SHAPES: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "tiny": ("Llama", 64, 96, 2, 4, 2, 512, False),
    "0.5b": ("Qwen2", 896, 4_864, 24, 14, 2, 151_936, True),
    "1.5b": ("Qwen2", 1_536, 8_960, 28, 12, 2, 151_936, True),
    "8b": ("Llama", 4_096, 14_336, 32, 32, 8, 128_256, False),
    "32b": ("Qwen2", 5_120, 27_648, 64, 40, 8, 152_064, False),
    "70b": ("Llama", 8_192, 28_672, 80, 64, 8, 128_256, False),
}
FORWARD, FROZEN = 2, 4
"""FLOPs a weight and token: of a forward, and with the backward through weights that get no gradient."""
PASSES = {"sft": FROZEN, "reward": FROZEN, "dpo": FROZEN + FORWARD, "kto": FROZEN + FORWARD}


def config_of(shape: str) -> Any:
    """The configuration of a Llama or Qwen 2."""
    import transformers

    family, hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8_192,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )


def base(shape: str, device: str, *, head: bool = True) -> Any:
    """A causal language model, or without the head a classifier of one label."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = config_of(shape)
    if not head:
        config.num_labels = 1
    kind = AutoModelForCausalLM if head else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.bfloat16)
    quantize_layers(model, Quantization(compute_dtype="bfloat16"))
    torch.manual_seed(0)
    fill(model, device)
    return model.train()


def fill(model: Any, device: str) -> None:
    """Random weights for a model on the meta device; those to be quantised one at a time."""
    import bitsandbytes as bnb

    made: dict[int, Any] = {}  # tied weights stay one
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                made.setdefault(id(old), _made(old, device))
                module._parameters[name] = made[id(old)]
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty_like(old, device=device)
    for module in model.modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            model._init_weights(module)


def _made(old: Any, device: str) -> Any:
    import bitsandbytes as bnb

    weight = torch.empty(old.shape, dtype=old.dtype, device=device)
    if not isinstance(old, bnb.nn.Params4bit):
        return nn.Parameter(weight, requires_grad=old.requires_grad)
    settings = {name: value for name, value in vars(old).items() if name != "_is_hf_initialized"}
    return bnb.nn.Params4bit(weight.normal_(std=0.02), requires_grad=False, **settings).to(device)


def policy(shape: str, device: str, checkpointing: bool | str, *, compile: bool = False) -> LanguageModel:
    """Ours: the base with a fresh adapter."""
    settings = Policy(shape, lora=LoRA(), gradient_checkpointing=checkpointing, compile=compile)
    return prepare(base(shape, device), settings)


def write_reward(model: LanguageModel, folder: Path) -> str:
    """A reward model's adapter on the base of a policy; the base's directory has no weights."""
    place = folder / "base"
    for saved in (model.config, letters()):
        saved.save_pretrained(place)
    model.causal_lm.name_or_path = str(place)
    weights = {
        name: torch.randn(p.shape) / 100 for name, p in model.model.named_parameters() if ".lora_" in name
    }
    head = ScoreHead(model.config.hidden_size)
    adapter = classifier_adapter(model.config, lora_config(LoRA()), str(place), weights, head)
    adapter.save_pretrained(folder / "reward")
    return str(folder / "reward")


def flops(shape: str, batch: PackedBatch, task: str, num_epochs: int = 1) -> float:
    """Arithmetic that a step needs, what is computed again and adapters not counted.

    Of PPO: the generation, a forward of policy, reference, critic and reward, and ``num_epochs`` trained passes of
    policy and critic.
    """
    _, hidden, inner, layers, heads, kv_heads, vocabulary, _ = SHAPES[shape]
    width = hidden // heads
    body = layers * (2 * hidden * hidden + 2 * hidden * kv_heads * width + 3 * hidden * inner)
    seen = 0
    for segment in batch.segments:
        length, prompt = segment.end - segment.start, segment.prompt_end - segment.prompt_start
        seen += length * prompt + length * (length + 1) // 2
    trunk = float(body * len(batch.input_ids) + layers * 2 * hidden * seen)
    head = float(hidden * vocabulary * len(batch.targets))
    if task == "ppo":
        policies, others = 3 * FORWARD + num_epochs * FROZEN, 2 * FORWARD + num_epochs * FROZEN
        return policies * (trunk + head) + others * trunk
    return PASSES[task] * (trunk + (0.0 if task == "reward" else head))
