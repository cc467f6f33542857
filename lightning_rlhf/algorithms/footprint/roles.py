"""The models of a training, without data: policy, reference, critic, members and rewards."""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lightning_rlhf.algorithms.footprint.settings import RewardRole, Training
from lightning_rlhf.models import LanguageModel, Policy, ScoreHead, Scorer
from lightning_rlhf.models.adapters import add_adapter, copy_adapter, member_adapter
from lightning_rlhf.models.checkpointing import HostMemory
from lightning_rlhf.models.critic import VALUE_ADAPTER, Critic
from lightning_rlhf.models.language_model import disable_dropout, freeze_vocabulary_head, is_adapter
from lightning_rlhf.models.loading import (
    POLICY_ADAPTER,
    adapter_config,
    is_quantized,
    trainable_settings,
    unquantized_experts,
)
from lightning_rlhf.models.memory import MemoryLedger, moments_bytes
from lightning_rlhf.models.reference import REFERENCE_ADAPTER
from lightning_rlhf.models.skeleton import skeleton

OPTIMIZER = "optimizer"
ADAPTERS = {POLICY_ADAPTER: "policy", REFERENCE_ADAPTER: "reference", VALUE_ADAPTER: "critic"}
IN_TRUE_HALF = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass
class Roles:
    """The models, and the ledger that their weights are booked in.

    Attributes:
        ledger: Under which they compute.
        policy: What is trained.
        reference: A model of its own, the policy where it is a role of it, or None.
        reference_adapter: Of that role; None for the base alone.
        critic: Of PPO.
        members: Of a reward model.
        rewards: What scores samples.
        trainable: Elements of every trained tensor.
        paged: Bytes of the optimizer in paged memory.
    """

    ledger: MemoryLedger
    policy: LanguageModel
    reference: LanguageModel | None
    reference_adapter: str | None
    critic: Critic | None
    members: list[Scorer]
    rewards: list[tuple[Scorer, RewardRole]]
    trainable: list[int]
    paged: int = 0

    def as_reference(self) -> AbstractContextManager[Any]:
        """The policy in the reference's role, or the reference's own model."""
        if self.reference is self.policy:
            return self.policy.role(self.reference_adapter)
        return nullcontext()

    def modules(self) -> dict[str, nn.Module]:
        """By what they are called in a table, the policy first."""
        found: dict[str, nn.Module] = {"policy": self.policy}
        if self.reference is not None and self.reference is not self.policy:
            found["reference"] = self.reference
        if self.critic is not None:
            found["critic"] = self.critic
        found |= {f"member {index}": scorer for index, scorer in enumerate(self.members)}
        found |= {f"reward model {index}": scorer for index, (scorer, _) in enumerate(self.rewards)}
        return found


def build(training: Training) -> Roles:
    """Make the models of a training as its module would, on the meta device, and book them with the optimizer.

    Raises:
        FileNotFoundError: If there is no model's configuration at a path.
        ValueError: If a role is asked for that needs an adapter, and the policy has none.
    """
    policy = skeleton(training.policy)
    members: list[Scorer] = []
    with torch.device("meta"):
        reference, adapter = _reference(policy, training) if training.has_reference else (None, None)
        if training.algorithm == "RewardModel":
            freeze_vocabulary_head(policy)
            members = [_member(policy, training.policy, index) for index in range(training.members)]
        rewards = [(_scorer(policy, role, index), role) for index, role in enumerate(training.rewards)]
        # Last of the adapters, as in PPO: what it adds is trained.
        critic = Critic(policy, training.critic) if training.has_critic else None
    ledger = MemoryLedger(policy.config.get_text_config().vocab_size)
    roles = Roles(ledger, policy, reference, adapter, critic, members, rewards, [])
    for name, module in roles.modules().items():
        if training.algorithm != "SFT":
            disable_dropout(module)
        if training.precision in IN_TRUE_HALF:
            module.to(IN_TRUE_HALF[training.precision])
        fused = unquantized_experts(module) if is_quantized(module) else {}
        ledger.hold(module, lambda path, name=name, fused=fused: _category(name, path, path in fused))  # type: ignore[misc]
        roles.trainable += [p.numel() for p in module.parameters() if p.requires_grad]
        ledger.watch_gradients(module)
        for part in module.modules():
            if isinstance(part, LanguageModel) and part.offload is HostMemory:
                part.offload = partial(HostMemory, ledger.to_host)
    moments, roles.paged = moments_bytes(training.optimizer, roles.trainable)
    ledger.book(OPTIMIZER, moments)
    return roles


def _category(module: str, path: str, is_fused: bool = False) -> str:
    """What a parameter's bytes are booked under; experts that are not quantised have a row of their own.

    Example:
        >>> _category("policy", "model.q_proj.lora_A.value.weight"), _category("critic", "head.weight")
        ('critic adapter', 'critic')
    """
    if not is_adapter(path):
        return f"{module}, experts not quantised" if is_fused else module
    adapter = path.rpartition(".lora_")[2].split(".")[1]
    return f"{ADAPTERS.get(adapter, adapter)} adapter"


def _reference(policy: LanguageModel, training: Training) -> tuple[LanguageModel, str | None]:
    """As :class:`~lightning_rlhf.models.Reference` chooses it, but by settings: there are no weights to look at."""
    if training.reference is not None:
        return skeleton(training.reference).requires_grad_(False), None
    if not isinstance(policy.model, PeftModel):
        return copy.deepcopy(policy).requires_grad_(False), None
    if adapter_config(training.policy.path) is None and not training.reference_follows:
        return policy, None
    copy_adapter(policy.model, REFERENCE_ADAPTER, trainable=False)
    return policy, REFERENCE_ADAPTER


def _member(policy: LanguageModel, settings: Policy, index: int) -> Scorer:
    head = ScoreHead(policy.config.get_text_config().hidden_size)
    has_adapter = isinstance(policy.model, PeftModel)
    if index == 0:
        return Scorer(policy, head, POLICY_ADAPTER if has_adapter else None, owns=False)
    if isinstance(policy.model, PeftModel):
        name = member_adapter(index)
        add_adapter(policy.model, name, policy.model.peft_config[POLICY_ADAPTER], trainable=True)
        return Scorer(policy, head, name, owns=False)
    own = skeleton(settings)
    freeze_vocabulary_head(own)
    return Scorer(own, head)


def _scorer(policy: LanguageModel, role: RewardRole, index: int) -> Scorer:
    if role.share_base:
        if not isinstance(policy.model, PeftModel):
            raise ValueError(
                "share_base: a reward adapter shares the base of a policy with LoRA, and it has none"
            )
        name = f"reward_{index}"
        given = adapter_config(role.policy.path) is not None
        config = trainable_settings(role.policy.path) if given else policy.model.peft_config[POLICY_ADAPTER]
        add_adapter(policy.model, name, config, trainable=False)
        head = ScoreHead(policy.config.get_text_config().hidden_size)
        return Scorer(policy, head, name, owns=False).requires_grad_(False).eval()
    model = skeleton(replace(role.policy, gradient_checkpointing=False, offload_activations=False))
    head = ScoreHead(model.config.get_text_config().hidden_size)
    return Scorer(model, head).requires_grad_(False).eval()
