"""A model of settings without its weights: what is asked of it can be counted, and nothing is loaded."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from lightning_rlhf.models.language_model import LanguageModel
from lightning_rlhf.models.loading import (
    POLICY_ADAPTER,
    adapter_config,
    bitsandbytes_config,
    keep_gradients_on_cpu,
    lora_config,
    model_config,
    not_found,
    trainable_settings,
    weights_dtype,
)
from lightning_rlhf.models.settings import Policy, Quantization


def skeleton(policy: Policy) -> LanguageModel:
    """The model that :func:`~lightning_rlhf.models.load_language_model` would load, on the meta device.

    Args:
        policy: Path, dtype, LoRA, quantisation and layout; only configurations are read.

    Returns:
        The model: its parameters have shapes and dtypes, those to be quantised not yet.

    Raises:
        FileNotFoundError: If there is no model's configuration at the path, and none to be had from the Hub.
    """
    try:
        config: Any = model_config(policy)
    except OSError as error:
        raise not_found("configuration of a model", policy.path) from error
    adapter = adapter_config(policy.path)
    dtype = weights_dtype(policy, trains_adapter=adapter is not None or policy.lora is not None)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    if policy.quantization is not None:
        dtype = getattr(torch, policy.quantization.compute_dtype)
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=policy.trust_remote_code
        )
    if policy.quantization is not None:
        quantize_layers(base, policy.quantization)
    wrapped: PreTrainedModel | PeftModel = base.train()
    settings: PeftConfig | None = None if policy.lora is None else lora_config(policy.lora)
    if adapter is not None:
        settings = trainable_settings(policy.path)
    if settings is not None:
        with torch.device("meta"):
            wrapped = get_peft_model(base, settings, adapter_name=POLICY_ADAPTER)
    # Outside: the probe of the layout computes on a shrunk copy.
    model = LanguageModel(wrapped, layout=policy.layout)
    if policy.gradient_checkpointing:
        model.enable_gradient_checkpointing(
            selective=policy.gradient_checkpointing == "selective", offload=policy.offload_activations
        )
    return model


def quantize_layers(model: PreTrainedModel, quantization: Quantization) -> None:
    """As Transformers does while it loads: all linear layers but the head."""
    from bitsandbytes import functional

    with torch.device("cpu"):  # made now, with data: a table that it keeps for all layers to come
        functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    replace_with_bnb_linear(
        model,
        modules_to_not_convert=get_keys_to_not_convert(model),
        quantization_config=bitsandbytes_config(quantization),
    )
    keep_gradients_on_cpu(model)
    setattr(model, f"is_loaded_in_{quantization.bits}bit", True)
