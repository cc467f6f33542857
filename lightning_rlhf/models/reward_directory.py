"""Reward model directories, in both directions: ``AutoModelForSequenceClassification`` with one label."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from lightning_rlhf.models.adapters import add_adapter
from lightning_rlhf.models.language_model import LanguageModel
from lightning_rlhf.models.loading import (
    POLICY_ADAPTER,
    adapter_config,
    base_path,
    load_language_model,
    trainable_settings,
)
from lightning_rlhf.models.scorer import ScoreHead, Scorer
from lightning_rlhf.models.settings import Policy

HEAD = "score.weight"
ADAPTER_HEAD = f"base_model.model.{HEAD}"
NORMALIZATION = "score_normalization.json"
"""Mean of the normalised scores on the reference samples before it is taken away; the scale is in the head."""


def load_scorer(policy: Policy | str) -> Scorer:
    """Load a reward model to score with.

    Args:
        policy: Its directory or Hub id, with or without settings: a model or an adapter, one that this package
            exported or any ``AutoModelForSequenceClassification`` with one label and a head called ``score``.

    Returns:
        The scorer, frozen and in eval mode.

    Raises:
        ValueError: If there is no trained head, or it is of another base.
    """
    settings = Policy.from_config(policy)
    head = read_head(settings.path)
    if head is None:
        raise ValueError(
            f"{settings.path!r} is no reward model: it has no trained score head, and a random one would score at "
            "random. Train one with RewardModel and export it"
        )
    return Scorer(load_language_model(settings), head).eval().requires_grad_(False)


def add_scorer(model: LanguageModel, path: str, name: str) -> Scorer:
    """Load a reward model's adapter beside a policy's, on the base that both share.

    Args:
        model: A policy with an adapter; it goes on computing what it did.
        path: The reward model's adapter directory.
        name: Of the new adapter.

    Returns:
        A frozen scorer that sees the model, and owns nothing but its head.

    Raises:
        ValueError: If the directory holds no reward model's adapter, it is of another base, or the policy has none.
    """
    head = read_head(path)
    if head is None or adapter_config(path) is None:
        raise ValueError(f"{path!r} holds no adapter of a reward model: only those can share a policy's base")
    if not isinstance(model.model, PeftModel):
        raise ValueError("a reward adapter shares the base of a policy with LoRA, and this policy has none")
    base, theirs = _place(str(model.causal_lm.name_or_path)), _place(base_path(path))
    if base != theirs:
        raise ValueError(
            f"the reward model at {path!r} was trained on the base {theirs!r}, and the policy's is {base!r}: its "
            "scores would mean nothing there. Load it as a model of its own, or train it on this base"
        )
    add_adapter(model.model, name, trainable_settings(path), trainable=False)
    weights = {n: w for n, w in load_peft_weights(path, device="cpu").items() if n != ADAPTER_HEAD}
    set_peft_model_state_dict(model.model, weights, adapter_name=name)
    return Scorer(model, head, name, owns=False).requires_grad_(False)


def _place(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def read_head(path: str) -> ScoreHead | None:
    """The score head of a reward model directory or Hub repository.

    Returns:
        The head with its normalisation, or None where the path is of another kind of model.

    Raises:
        ValueError: If it is a classifier but has not one label, or no safetensors with ``score.weight``.
    """
    adapter = adapter_config(path)
    scores = is_classifier(path) if adapter is None else adapter.task_type == TaskType.SEQ_CLS
    if not scores:
        return None
    if adapter is None:
        weight = _tensor(path, "model.safetensors", HEAD)
    else:
        weight = _tensor(path, "adapter_model.safetensors", ADAPTER_HEAD)
    if weight is None:
        raise ValueError(
            f"{path!r} is a classifier without {HEAD!r} in its safetensors: only a head that is a single linear "
            "layer called 'score' can be loaded"
        )
    if weight.shape[0] != 1:
        raise ValueError(f"{path!r} has {weight.shape[0]} labels; a reward model has one (num_labels=1)")
    head = ScoreHead(weight.shape[1])
    with torch.no_grad():
        head.weight.copy_(weight)
    kept = _file(path, NORMALIZATION)
    if kept is not None:
        head.mean = float(json.loads(Path(kept).read_text())["mean"])
    return head


def is_classifier(path: str) -> bool:
    """Whether a model's configuration says that it is a sequence classifier."""
    config = AutoConfig.from_pretrained(path)
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _file(path: str, name: str) -> str | None:
    found: str | None = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found


def _tensor(path: str, name: str, key: str) -> Tensor | None:
    """One tensor of a model's safetensors, which may be in shards."""
    index = _file(path, f"{name}.index.json")
    if index is not None:
        name = json.loads(Path(index).read_text())["weight_map"].get(key)
    file = None if name is None else _file(path, name)
    if file is None:
        return None
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(key).float() if key in tensors.keys() else None  # noqa: SIM118 - no mapping


def classifier(
    config: PreTrainedConfig, weights: Mapping[str, Tensor], head: ScoreHead, pad_token_id: int
) -> PreTrainedModel:
    """A sequence classifier of the weights of a causal language model and a head.

    The normalisation's scale is folded into the head, and its mean dropped: the class has no bias.

    Args:
        config: Of the language model.
        weights: Under the language model's names; a vocabulary projection among them is left out.
        head: The score head.
        pad_token_id: What pads; one past the vocabulary adds a row to the embedding, which nothing reads.

    Returns:
        The model, to be saved.

    Raises:
        ValueError: If the weights do not fit.
    """
    config = copy.deepcopy(config)
    config.num_labels, config.pad_token_id = 1, pad_token_id
    text = config.get_text_config()
    grows = pad_token_id >= text.vocab_size
    text.vocab_size, text.pad_token_id = max(text.vocab_size, pad_token_id + 1), pad_token_id
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    expected = set(model.state_dict())
    given = {name: value for name, value in weights.items() if name in expected}
    embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    if grows and embedding in given:
        given[embedding] = F.pad(given[embedding], (0, 0, 0, 1))
    given[HEAD] = folded(head).to(next(iter(weights.values())).dtype)
    if expected - set(given):
        raise ValueError(f"the weights do not fit: missing {sorted(expected - set(given))[:3]} (first three)")
    model.load_state_dict(given, assign=True)
    return model


def classifier_adapter(
    config: PreTrainedConfig,
    settings: PeftConfig,
    base: str,
    weights: Mapping[str, Tensor],
    head: ScoreHead,
) -> PeftModel:
    """An adapter with its head for a sequence classifier on a base.

    Args:
        config: Of the base.
        settings: Of the adapter, as it was trained.
        base: Where the base is, as the adapter directory should name it.
        weights: The adapter's weights, under the name of the policy's adapter.
        head: The score head.

    Returns:
        The model on the meta device but for the adapter and the head, to be saved.
    """
    config = copy.deepcopy(config)
    config.num_labels = 1
    settings = copy.deepcopy(settings)
    settings.task_type = TaskType.SEQ_CLS
    settings.base_model_name_or_path = base
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    model.name_or_path = base
    wrapped = get_peft_model(model, settings, adapter_name=POLICY_ADAPTER, low_cpu_mem_usage=True)
    wrapped.peft_config[POLICY_ADAPTER].base_model_name_or_path = base
    name = f"base_model.model.score.modules_to_save.{POLICY_ADAPTER}.weight"
    state: dict[str, Any] = {**weights, name: folded(head)}
    missing = [n for n, p in wrapped.named_parameters() if (".lora_" in n or n == name) and n not in state]
    unknown = sorted(set(state) - set(wrapped.state_dict()))
    if missing or unknown:
        raise ValueError(f"the adapter does not fit the base: missing {missing[:3]}, unknown {unknown[:3]}")
    wrapped.load_state_dict(state, strict=False, assign=True)
    return wrapped


def folded(head: ScoreHead) -> Tensor:
    """The head's weights in units of the reference samples."""
    return head.weight.detach() / head.std


def save_normalization(head: ScoreHead, folder: Path) -> None:
    """Write what the folded head still lacks: the mean, in units of the reference samples."""
    (folder / NORMALIZATION).write_text(json.dumps({"mean": head.mean / head.std}) + "\n")


def separate_pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """Make sure that padding is not what a completion ends with: the class reads the last token that is no padding.

    Args:
        tokenizer: Changed in place where its pad token is missing or is the end token: it then pads with the unknown
            or the first token, or with a new one.

    Returns:
        The pad token's id; of a new token, one past the vocabulary.
    """
    free = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token)
    token = next((t for t in free if t is not None and t != tokenizer.eos_token), None)
    if token is None:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    else:
        tokenizer.pad_token = token
    return int(tokenizer.pad_token_id)
