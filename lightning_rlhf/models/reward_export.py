"""From a checkpoint of a reward model, or of an ensemble of them, to directories that score anywhere."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_rlhf.models.adapters import member_adapter
from lightning_rlhf.models.export import (
    adapter_base,
    adapter_settings,
    checkpoint_policy,
    merged_model,
    policy_weights,
    read_checkpoint,
    save_model,
    written_whole,
)
from lightning_rlhf.models.language_model import is_adapter
from lightning_rlhf.models.loading import load_tokenizer, model_config
from lightning_rlhf.models.reward_directory import (
    classifier,
    classifier_adapter,
    save_normalization,
    separate_pad,
)
from lightning_rlhf.models.scorer import ScoreHead
from lightning_rlhf.models.settings import Dtype, Policy, changes_base

Weights = dict[str, Tensor]
Member = tuple[Weights, ScoreHead]


def export_reward_model(
    checkpoint: Path,
    output: Path,
    *,
    merge: bool = False,
    dtype: Dtype = "auto",
    overwrite: bool = False,
    member: int | None = None,
    average: bool = False,
) -> str:
    """Write a reward model as a directory for ``AutoModelForSequenceClassification``, with its tokenizer.

    An ensemble becomes a directory with one such directory a member, ``member_0`` and so on; or one of them alone;
    or their average (WARM, Ramé et al., 2024).

    Args:
        checkpoint: A checkpoint of ``RewardModel``, a file or a sharded one's directory.
        output: The directory to make.
        merge: Add the adapter to the base's weights.
        dtype: Of merged or full weights; ``auto`` is the dtype they were trained in, bfloat16 for a quantised base.
        overwrite: Replace ``output`` where it exists.
        member: Write this member only.
        average: Write one model whose weights are the members' mean: ΔW = BA is averaged, not A and B.

    Returns:
        What was written, in words.

    Raises:
        ValueError: If the checkpoint is no reward model's, or has no such member, or cannot be exported as asked.
    """
    content = read_checkpoint(checkpoint)
    members = read_members(content["state_dict"])
    policy = checkpoint_policy(content, checkpoint)
    if member is not None and not 0 <= member < len(members):
        raise ValueError(f"member {member} of an ensemble of {len(members)}: give 0 to {len(members) - 1}")
    if average and (member is not None or len(members) == 1):
        raise ValueError(
            "average takes all members of an ensemble: it needs several, and no member beside it"
        )
    if average:
        members, settings = average_members(members, policy)
    else:
        settings = adapter_settings(policy) if is_trained_adapter(members[0][0]) else None
        members = members if member is None else [members[member]]
    with written_whole(output, overwrite=overwrite) as folder:
        for index, one in enumerate(members):
            place = folder if len(members) == 1 else folder / f"member_{index}"
            place.mkdir(exist_ok=True)
            kind = _write(one, policy, settings, place, merge=merge, dtype=dtype)
    many = f" of {len(members)} members" if len(members) > 1 else ""
    return f"RewardModel {kind}{many}"


def is_reward_model(checkpoint: Path) -> bool:
    """Whether a checkpoint is a reward model's."""
    return "ensemble.scorers.0.head.weight" in read_checkpoint(checkpoint, weights=False)["state_dict"]


def read_members(state: Mapping[str, Any]) -> list[Member]:
    """Every member's weights, an adapter under the name of the policy's, and its head.

    Raises:
        ValueError: If there is no score head in the state.
    """
    members: list[Member] = []
    while (key := f"ensemble.scorers.{len(members)}.head.") + "weight" in state:
        index = len(members)
        head = ScoreHead(state[key + "weight"].shape[1])
        head.load_state_dict({"weight": state[key + "weight"], "_extra_state": state[key + "_extra_state"]})
        weights = policy_weights(state, member_adapter(index))
        own = f"ensemble.scorers.{index}.model.model."
        if index and not is_trained_adapter(weights):
            weights = {n.removeprefix(own): w for n, w in state.items() if n.startswith(own)}
        members.append((weights, head))
    if not members:
        raise ValueError("the checkpoint holds no score head: it is not a reward model's")
    return members


def is_trained_adapter(weights: Mapping[str, Tensor]) -> bool:
    """Whether trained weights are an adapter's."""
    return any(is_adapter(name) for name in weights)


def average_members(members: Sequence[Member], policy: Policy) -> tuple[list[Member], PeftConfig | None]:
    r"""One member whose weights are the mean: $\Delta W = \frac{1}{k} \sum_i s B_i A_i$, exactly.

    The mean of k adapters of rank r is an adapter of rank k·r: the A's on top of each other, the B's side by side.

    Args:
        members: Their weights and heads; normalised scores are averaged, so the heads are folded first.
        policy: What they were trained from.

    Returns:
        The member, and the settings of its adapter.

    Raises:
        ValueError: For DoRA, whose magnitude makes the update not linear in BA.
    """
    count = len(members)
    head = ScoreHead(members[0][1].weight.shape[1])
    with torch.no_grad():
        head.weight.copy_(torch.stack([h.weight / h.std for _, h in members]).mean(0))
    head.mean = sum(h.mean / h.std for _, h in members) / count
    weights = [w for w, _ in members]
    if not is_trained_adapter(weights[0]):
        mean = {
            n: torch.stack([w[n].double() for w in weights]).mean(0).to(v.dtype)
            for n, v in weights[0].items()
        }
        return [(mean, head)], None
    settings: Any = copy.deepcopy(adapter_settings(policy))
    if settings.use_dora:
        raise ValueError(
            "members with use_dora have no average as an adapter: export them merged, one by one"
        )
    scale = math.sqrt(count) if settings.use_rslora else count
    settings.r, settings.lora_alpha = settings.r * count, settings.lora_alpha * scale
    averaged = {
        name: torch.cat([w[name] for w in weights], dim=0)
        if ".lora_A." in name or ".lora_embedding_A." in name
        else torch.cat([w[name] for w in weights], dim=1) / count
        for name in weights[0]
    }
    return [(averaged, head)], settings


def _write(
    member: Member, policy: Policy, settings: PeftConfig | None, folder: Path, *, merge: bool, dtype: Dtype
) -> str:
    weights, head = member
    tokenizer = load_tokenizer(policy.path, trust_remote_code=policy.trust_remote_code)
    config = model_config(policy)
    pad = separate_pad(tokenizer)
    model: PreTrainedModel | PeftModel
    if settings is not None and not merge:
        if policy.lora is not None and changes_base(policy.lora.init):
            raise ValueError(f"lora.init {policy.lora.init!r} changed the base: use --merge")
        model = classifier_adapter(config, settings, adapter_base(policy), weights, head)
        kind = f"adapter of {adapter_base(policy)}"
    elif settings is not None:
        full = merged_model(policy, weights, dtype, settings)
        model = classifier(full.config, full.state_dict(), head, pad)
        kind = "merged model"
    else:
        kept = next(iter(weights.values())).dtype if dtype == "auto" else getattr(torch, dtype)
        model = classifier(config, {n: w.to(kept) for n, w in weights.items()}, head, pad)
        kind = "model"
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    save_normalization(head, folder)
    return kind
