"""From a path, a Hub id or a built module to a trainable :class:`LanguageModel` and its tokenizer."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_rlhf.models.compilation import compile_layers
from lightning_rlhf.models.language_model import LanguageModel
from lightning_rlhf.models.settings import LoRA, Policy, Quantization

POLICY_ADAPTER = "default"


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer by Hub id or directory.

    Args:
        path: Hub id, or a directory of a model or an adapter.
        trust_remote_code: Run code that comes with it.

    Returns:
        The tokenizer, unchanged: no pad token is invented, since masks come from lengths.

    Raises:
        FileNotFoundError: If it is neither a directory nor to be had from the Hub.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if adapter_config(path) is not None:
            return load_tokenizer(base_path(path), trust_remote_code=trust_remote_code)
        raise not_found("tokenizer", path) from error


def load_language_model(policy: Policy) -> LanguageModel:
    """Load a model as its settings say, ready to train.

    Args:
        policy: Path, dtype, LoRA, quantisation and layout.

    Returns:
        The model: only what is to be trained requires gradients.

    Raises:
        FileNotFoundError: If the model is neither a directory nor to be had from the Hub.
        ValueError: If the settings contradict each other.

    Example:
        >>> load_language_model(Policy("no/such-model"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: no model at 'no/such-model': ...
    """
    adapter = adapter_config(policy.path)
    if adapter is not None and policy.lora is not None:
        raise ValueError(
            f"policy.path {policy.path!r} is an adapter already: leave policy.lora out to train it further, or "
            "merge it first with `lightning-rlhf export --merge`"
        )
    if policy.quantization is not None and policy.lora is None and adapter is None:
        raise ValueError("quantised weights cannot be trained: give policy.lora as well (QLoRA)")
    trains_adapter = adapter is not None or policy.lora is not None
    base = load_base(
        base_path(policy.path),
        dtype=weights_dtype(policy, trains_adapter=trains_adapter),
        quantization=policy.quantization,
        trust_remote_code=policy.trust_remote_code,
    )
    return prepare(base, policy, adapter_path=policy.path if adapter is not None else None)


def prepare(model: PreTrainedModel, policy: Policy, *, adapter_path: str | None = None) -> LanguageModel:
    """Give a loaded model its adapter, checkpointing, layout and compilation.

    Args:
        model: The base, changed in place.
        policy: The settings; its path is not read.
        adapter_path: A directory of an adapter to go on from.

    Returns:
        The model as a :class:`LanguageModel`.
    """
    wrapped: PreTrainedModel | PeftModel = model
    if adapter_path is not None:
        wrapped = PeftModel.from_pretrained(
            model,
            adapter_path,
            adapter_name=POLICY_ADAPTER,
            is_trainable=True,
            config=trainable_settings(adapter_path),
        )
    elif policy.lora is not None:
        wrapped = get_peft_model(model, lora_config(policy.lora), adapter_name=POLICY_ADAPTER)
    language_model = LanguageModel(wrapped, layout=policy.layout)
    if policy.gradient_checkpointing:
        language_model.enable_gradient_checkpointing(
            selective=policy.gradient_checkpointing == "selective", offload=policy.offload_activations
        )
    if policy.compile:
        compile_layers(language_model)
    return language_model


def load_base(
    path: str,
    *,
    dtype: torch.dtype | str,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the weights of a causal language model, quantised where asked.

    Args:
        path: Hub id or directory.
        dtype: Of the weights, or ``auto`` for the checkpoint's own.
        quantization: 4 or 8 bits.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The model in train mode.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    extra: dict[str, Any] = {}
    if quantization is not None:
        extra = {"quantization_config": bitsandbytes_config(quantization)}
        dtype = getattr(torch, quantization.compute_dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, **extra
        )
    except OSError as error:
        raise not_found("model", path) from error
    if quantization is not None:
        keep_gradients_on_cpu(model)
        _warn_of_unquantized_experts(model)
    return model.train()


def lora_config(lora: LoRA) -> LoraConfig:
    """The settings in PEFT's own words.

    Example:
        >>> lora_config(LoRA(r=4, alpha=8)).target_modules
        'all-linear'
    """
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        init_lora_weights=True if lora.init == "default" else lora.init,  # type: ignore[arg-type]
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )


def bitsandbytes_config(quantization: Quantization) -> BitsAndBytesConfig:
    """The settings in Transformers' own words; stored in the compute dtype, so that FSDP2 can shard them."""
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(torch, quantization.compute_dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def keep_gradients_on_cpu(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit layers to a CPU kernel that has no gradient.

    On processors with AVX512-BF16 any forward without gradients in eval mode repacks ``Linear4bit``; training
    gradients are then wrong without a word, and ``state_dict()`` is lossy.

    Args:
        model: Changed in place.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes holds some of a model's weights in 4 or 8 bits."""
    import bitsandbytes as bnb

    return any(isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for m in model.modules())


def unquantized_experts(model: nn.Module) -> dict[str, int]:
    """Names and sizes of fused expert weights: bitsandbytes quantises linear layers only."""
    return {n: p.numel() for n, p in model.named_parameters() if p.ndim == 3 and p.is_floating_point()}


def _warn_of_unquantized_experts(model: PreTrainedModel) -> None:
    fused = unquantized_experts(model)
    if fused:
        count = sum(fused.values())
        warnings.warn(
            f"{len(fused)} fused expert weights ({count / 1e6:,.0f}M parameters) stay in {model.dtype}: bitsandbytes "
            "quantises linear layers only",
            stacklevel=3,
        )


def adapter_config(path: str) -> PeftConfig | None:
    """The configuration of an adapter directory, or None where the path is none."""
    if not (Path(path) / "adapter_config.json").is_file():
        return None
    return PeftConfig.from_pretrained(path)


def trainable_settings(path: str) -> PeftConfig:
    """The settings of an adapter directory for a causal language model that trains it further.

    A reward model's adapter brings a head, which such a model has no place for: see
    :func:`~lightning_rlhf.models.reward_directory.read_head`.
    """
    config: Any = PeftConfig.from_pretrained(path)
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, False
    found: PeftConfig = config
    return found


def base_path(path: str) -> str:
    """Where the base model is: the path itself, or what the adapter there names.

    Raises:
        ValueError: If the adapter's configuration does not say.
    """
    adapter = adapter_config(path)
    if adapter is None:
        return path
    if adapter.base_model_name_or_path is None:
        raise ValueError(
            "adapter_config.json names no base_model_name_or_path: add the base model's path to it"
        )
    return adapter.base_model_name_or_path


def model_config(policy: Policy) -> Any:  # noqa: ANN401 - every architecture has its own class
    """The Transformers configuration of a policy, without its weights."""
    return AutoConfig.from_pretrained(base_path(policy.path), trust_remote_code=policy.trust_remote_code)


def weights_dtype(policy: Policy, *, trains_adapter: bool) -> torch.dtype | str:
    """The dtype to load a policy's weights in; ``auto`` is the checkpoint's own.

    Example:
        >>> weights_dtype(Policy("a/model"), trains_adapter=False)
        torch.float32
    """
    if policy.dtype == "auto":
        return "auto" if trains_adapter else torch.float32
    dtype: torch.dtype = getattr(torch, policy.dtype)
    return dtype


def not_found(what: str, path: str) -> FileNotFoundError:
    """The error where a model or tokenizer is neither a directory nor to be had from the Hub."""
    return FileNotFoundError(
        f"no {what} at {path!r}: it is not a directory with one, and it could not be had from the Hub (no network, "
        "not cached, or no such repository). Check the spelling, or download it once where there is a network with "
        f"`hf download {path}`"
    )
