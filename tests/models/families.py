"""Tiny random models of the families that the shared-prefix layout is tested on."""

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
WINDOW = 6
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}

SUPPORTED = {
    "LlamaConfig": _COMMON,
    "Qwen2Config": _COMMON,
    "Qwen3Config": {**_COMMON, "head_dim": 8},
    "MistralConfig": {**_COMMON, "sliding_window": WINDOW},
    "Gemma2Config": {**_COMMON, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "Gemma3TextConfig": {
        **_COMMON,
        "num_hidden_layers": 6,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
    },
    "GPT2Config": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **_SPECIAL,
    },
    "GPTNeoXConfig": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        **_SPECIAL,
    },
    "PhiConfig": {**_COMMON, "num_key_value_heads": 4},
    "OlmoConfig": _COMMON,
    "Olmo2Config": _COMMON,
    "MixtralConfig": {**_COMMON, "num_local_experts": 4},
    "Qwen3MoeConfig": {
        **_COMMON,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "GptOssConfig": {
        **_COMMON,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "GraniteConfig": {**_COMMON, "logits_scaling": 3.0},
    "CohereConfig": _COMMON,
}
UNSUPPORTED = {
    "FalconConfig": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "BloomConfig": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "MambaConfig": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
    "StableLmConfig": _COMMON,
}


def tiny(name: str, seed: int = 0, **changed: int) -> PreTrainedModel:
    """A model whose weights are large enough for a wrong attention to show.

    Args:
        name: Of its configuration's class.
        seed: Of its weights.
        changed: Other settings than its family's, such as ``head_dim``.
    """
    settings = {**SUPPORTED, **UNSUPPORTED}[name] | changed
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**settings), attn_implementation="eager"
    )
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1.2 * parameter.shape[-1] ** -0.5)
    return model
