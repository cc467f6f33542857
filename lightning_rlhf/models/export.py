"""From a Lightning checkpoint to a directory that Transformers, PEFT, vLLM and Hub tools load unchanged."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_rlhf.models.language_model import is_adapter
from lightning_rlhf.models.loading import (
    POLICY_ADAPTER,
    adapter_config,
    base_path,
    load_base,
    load_tokenizer,
    lora_config,
    model_config,
    trainable_settings,
)
from lightning_rlhf.models.settings import Dtype, Policy, changes_base
from lightning_rlhf.models.sharded_checkpoint import (
    DEEPSPEED,
    is_deepspeed_checkpoint,
    is_sharded_checkpoint,
    read_sharded,
)

PREFIX = "policy.model."
"""Where a module's state holds the weights of its policy."""


def export_checkpoint(
    checkpoint: Path, output: Path, *, merge: bool = False, dtype: Dtype = "auto", overwrite: bool = False
) -> str:
    """Write the policy of a checkpoint as a model or adapter directory, with its tokenizer.

    A policy trained with LoRA becomes an adapter directory, which names its base; with ``merge``, a model directory.
    From a quantised base the adapter is merged onto the base loaded in bfloat16. A fully fine-tuned policy becomes a
    model directory. The directory appears whole or not at all.

    Args:
        checkpoint: A checkpoint of one of this package's modules, a file or the directory of one of many files.
        output: The directory to make.
        merge: Add the adapter to the base's weights.
        dtype: Of merged or full weights; ``auto`` is the dtype they were trained in, bfloat16 for a quantised base.
        overwrite: Replace ``output`` where it exists.

    Returns:
        What was written, in words.

    Raises:
        FileExistsError: If ``output`` exists and ``overwrite`` is not given.
        FileNotFoundError: If there is no such checkpoint, or no base model.
        ValueError: If it is no checkpoint of this package, or cannot be exported as asked.
    """
    refuse_existing(output, overwrite=overwrite)
    content = read_checkpoint(checkpoint)
    policy = checkpoint_policy(content, checkpoint)
    weights = policy_weights(content["state_dict"])
    trains_adapter = any(is_adapter(name) for name in weights)
    if trains_adapter and not merge:
        model: PreTrainedModel | PeftModel = _adapter(policy, weights)
        kind = f"adapter of {adapter_base(policy)}"
    elif trains_adapter:
        model, kind = merged_model(policy, weights, dtype, adapter_settings(policy)), "merged model"
    else:
        model, kind = _full(policy, weights, dtype), "model"
    tokenizer = load_tokenizer(policy.path, trust_remote_code=policy.trust_remote_code)
    with written_whole(output, overwrite=overwrite) as folder:
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
    return f"{content['algorithm']} {kind}"


def save_model(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Save a Transformers model, or the policy's adapter of a PEFT model, as safetensors.

    Raises:
        OSError: If the weights cannot be written, as on a full disk.
    """
    try:
        if isinstance(model, PeftModel):
            model.save_pretrained(
                str(folder), selected_adapters=[POLICY_ADAPTER], save_embedding_layers=False
            )
        else:
            model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"the weights could not be written into {folder.parent}: {error}") from error


def read_checkpoint(path: Path, *, weights: bool = True) -> dict[str, Any]:
    """Load a checkpoint, one file or a directory of FSDP2 or DeepSpeed; nothing in it is executed.

    Args:
        path: Of the file or directory.
        weights: Of a sharded checkpoint, read them; else its state has names and no values. Those of a file are read
            where they are used.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is something else.
    """
    if is_sharded_checkpoint(path):
        return read_sharded(path, weights=weights)
    if is_deepspeed_checkpoint(path):
        path = path / DEEPSPEED
    if path.is_dir():
        raise ValueError(
            f"{path} is a directory and no sharded checkpoint, or one that was not written to its end; a model "
            "directory needs no export"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    except Exception as error:
        # pickle.UnpicklingError, and whatever else bytes that are no pickle lead to.
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(f"{path} is not a readable checkpoint: {str(error)[:200]}") from error
    if isinstance(content, dict) and isinstance(content.get("module"), dict):  # DeepSpeed's name for it
        content["state_dict"] = {**content["module"], **content.get("beside_parameters", {})}
    if not isinstance(content, dict) or "algorithm" not in content or "state_dict" not in content:
        raise ValueError(f"{path} is no checkpoint of a lightning_rlhf module")
    return content


def checkpoint_policy(content: Mapping[str, Any], path: Path) -> Policy:
    """The settings of the policy that a checkpoint was trained with.

    Raises:
        ValueError: If it was given as a built model, whose origin a checkpoint does not know.
    """
    values = content.get("hyper_parameters", {}).get("policy")
    if values is None:
        raise ValueError(
            f"the run that wrote {path} was given a built model, so the checkpoint does not know where it came from: "
            "load the checkpoint into a module built the same way and call policy.model.save_pretrained(directory)"
        )
    return Policy.from_config(values)


def policy_weights(state: Mapping[str, Tensor], adapter: str = POLICY_ADAPTER) -> dict[str, Tensor]:
    """The policy's own weights of a module's state, under the model's own names; adapters of other roles are left out.

    Args:
        state: Of a module.
        adapter: Which one is wanted; it gets the name of the policy's.
    """
    own, kept = f".{adapter}.", f".{POLICY_ADAPTER}."
    return {
        name.removeprefix(PREFIX).replace(own, kept) if is_adapter(name) else name.removeprefix(PREFIX): value
        for name, value in state.items()
        if name.startswith(PREFIX) and (not is_adapter(name) or own in name)
    }


def adapter_base(policy: Policy) -> str:
    """The base's path as an adapter directory should name it: a local one must not depend on where it is read."""
    base = base_path(policy.path)
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def adapter_settings(policy: Policy) -> PeftConfig:
    """PEFT's settings of the adapter that a policy trains, fresh or one that it goes on from."""
    if adapter_config(policy.path) is not None:
        return trainable_settings(policy.path)
    if policy.lora is None:
        raise ValueError("the checkpoint holds an adapter, but its settings name none")
    return lora_config(policy.lora)


def _adapter(policy: Policy, weights: Mapping[str, Tensor]) -> PeftModel:
    if policy.lora is not None and changes_base(policy.lora.init):
        raise ValueError(
            f"lora.init {policy.lora.init!r} changed the base, so the adapter fits no base that others have: use "
            "--merge"
        )
    # An adapter is saved without its base: on the meta device the base takes neither memory nor time.
    config = model_config(policy)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=policy.trust_remote_code)
    base.name_or_path = adapter_base(policy)
    model = get_peft_model(
        base, adapter_settings(policy), adapter_name=POLICY_ADAPTER, low_cpu_mem_usage=True
    )
    model.peft_config[POLICY_ADAPTER].base_model_name_or_path = adapter_base(policy)
    _load_adapter(model, weights, assign=True)
    return model


def merged_model(
    policy: Policy, weights: Mapping[str, Tensor], dtype: Dtype, settings: PeftConfig
) -> PreTrainedModel:
    """The base with an adapter of these weights and settings added to its own weights."""
    quantized = policy.quantization is not None
    if quantized and policy.lora is not None and changes_base(policy.lora.init):
        raise ValueError(
            f"lora.init {policy.lora.init!r} on a quantised base cannot be merged onto another one"
        )
    name = policy.dtype if dtype == "auto" else dtype
    wanted: torch.dtype | str = "auto" if name == "auto" else getattr(torch, name)
    if quantized and dtype == "auto":
        wanted = torch.bfloat16
    base = load_base(adapter_base(policy), dtype=wanted, trust_remote_code=policy.trust_remote_code)
    model = get_peft_model(base, settings, adapter_name=POLICY_ADAPTER)
    _load_adapter(model, weights, assign=False)
    merged: Any = model.merge_and_unload(safe_merge=True)
    return merged


def _load_adapter(model: PeftModel, weights: Mapping[str, Tensor], *, assign: bool) -> None:
    expected = {name for name, _ in model.named_parameters() if is_adapter(name)}
    if expected != set(weights):
        raise ValueError(
            f"the checkpoint's adapter does not fit the base: missing {sorted(expected - set(weights))[:3]}, unknown "
            f"{sorted(set(weights) - expected)[:3]} (first three each); was the base replaced?"
        )
    model.load_state_dict(weights, strict=False, assign=assign)


def _full(policy: Policy, weights: Mapping[str, Tensor], dtype: Dtype) -> PreTrainedModel:
    kept = next(iter(weights.values())).dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_config(
        model_config(policy), dtype=kept, trust_remote_code=policy.trust_remote_code
    )
    missing, unknown = model.load_state_dict(weights, strict=False)
    persistent = set(model.state_dict())
    lost = [name for name in missing if name in persistent and not _is_buffer(model, name)]
    if lost or unknown:
        raise ValueError(
            f"the checkpoint does not fit {policy.path!r}: missing {lost[:3]}, unknown {unknown[:3]}"
        )
    return model


def _is_buffer(model: nn.Module, name: str) -> bool:
    return any(name == buffer for buffer, _ in model.named_buffers())


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Stop before any work where a result would replace another.

    Raises:
        FileExistsError: If the path exists, is no empty directory, and ``overwrite`` is not given.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not overwrite:
        raise FileExistsError(f"{path} exists already: give another name, or --overwrite to replace it")


@contextmanager
def written_whole(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into that takes its name only when everything is written.

    After an error, a full disk among them, nothing is left and what was there before is untouched.

    Args:
        path: Its name.
        overwrite: Replace what is there.

    Yields:
        The directory to write into, beside ``path``.
    """
    refuse_existing(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.replace(old)
            partial.replace(path)
            _remove(old)
        else:
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
