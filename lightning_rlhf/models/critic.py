"""The critic: the value of every state of a completion."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

from peft import PeftModel
from torch import Tensor, nn

from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models.adapters import add_adapter
from lightning_rlhf.models.compilation import copy_model
from lightning_rlhf.models.language_model import (
    LanguageModel,
    disable_dropout,
    freeze_vocabulary_head,
    is_adapter,
)
from lightning_rlhf.models.loading import POLICY_ADAPTER, load_language_model
from lightning_rlhf.models.scorer import Head
from lightning_rlhf.models.settings import Policy

VALUE_ADAPTER = "value"
CriticKind = Literal["adapter", "head", "model"]


def is_critic(name: str) -> bool:
    """Whether an algorithm's parameter of this name is the critic's: its head, its model, or its adapter.

    Example:
        >>> is_critic("critic.head.weight"), is_critic("policy.model.q_proj.lora_A.value.weight")
        (True, True)
        >>> is_critic("policy.model.attention.value.lora_A.default.weight")
        False
    """
    adapter = name.rpartition(".lora_")[2] if is_adapter(name) else ""
    return name.startswith("critic.") or f".{VALUE_ADAPTER}." in adapter


class Critic(nn.Module):
    """Values of the states in which the tokens of completions are chosen, by a head that starts at 0.

    ===========  ===============================================================================
    ``adapter``  a LoRA adapter of its own beside the policy's, on the same base
    ``head``     the policy's own hidden states, which the critic's loss trains as well
    ``model``    a model of its own, which starts as the policy does
    ===========  ===============================================================================

    Args:
        policy: What the values are of, before its first step.
        kind: By default ``adapter`` where the policy is one, else ``model``.
        settings: Of the policy, to load a model of the same weights; None for a built one, which is copied.

    Raises:
        ValueError: If there is no such kind, or an adapter is asked for beside a policy without one.
    """

    def __init__(
        self, policy: LanguageModel, kind: CriticKind | None = None, settings: Policy | None = None
    ) -> None:
        super().__init__()
        has_adapter = isinstance(policy.model, PeftModel)
        self.kind: CriticKind = kind or ("adapter" if has_adapter else "model")
        if self.kind not in get_args(CriticKind):
            raise ValueError(f"critic must be one of {', '.join(get_args(CriticKind))}, got {kind!r}")
        self.head = Head(policy.config.get_text_config().hidden_size, std=0.0, bias=True)
        self._policy = (policy,)  # seen, not owned
        if self.kind == "model":
            own = copy_model(policy) if settings is None else load_language_model(settings)
            disable_dropout(own)
            freeze_vocabulary_head(own)
            self.model = own
        elif self.kind == "adapter":
            if not isinstance(policy.model, PeftModel):
                raise ValueError(
                    "critic 'adapter' shares the base of a policy with LoRA, and this policy has none: choose 'model' "
                    "or 'head', or give policy.lora"
                )
            add_adapter(policy.model, VALUE_ADAPTER, policy.model.peft_config[POLICY_ADAPTER], trainable=True)
            disable_dropout(policy)  # the policy's own is off; a new adapter brings its own

    def _model(self) -> tuple[LanguageModel, AbstractContextManager[Any]]:
        (policy,) = self._policy
        if self.kind == "adapter":
            return policy, policy.role(VALUE_ADAPTER)
        return (self.model if self.kind == "model" else policy), nullcontext()

    def forward(self, batch: PackedBatch, hidden: Tensor) -> Tensor:
        """The value before each token that counts is chosen, ``(M,)``.

        Args:
            batch: Prompts with completions.
            hidden: The policy's hidden states there, ``(M, d)``; used by the kind ``head`` alone.
        """
        if self.kind != "head":
            model, role = self._model()
            with role:
                hidden = model.hidden_states(batch)
        values: Tensor = self.head(hidden)
        return values

    def at_ends(self, batch: PackedBatch) -> Tensor:
        """The value after the last token of each completion, ``(N,)``."""
        model, role = self._model()
        with role:
            values: Tensor = self.head(model.hidden_states(batch, at="ends"))
        return values
