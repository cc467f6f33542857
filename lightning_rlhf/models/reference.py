"""The reference policy of a KL anchor: explicit, and asserted to equal the policy at step 0."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.functional import TokenComparison, compare_logprobs, sum_by_sequence
from lightning_rlhf.models.adapters import copy_adapter, is_fresh
from lightning_rlhf.models.compilation import copy_model
from lightning_rlhf.models.language_model import LanguageModel
from lightning_rlhf.models.loading import POLICY_ADAPTER
from lightning_rlhf.models.settings import changes_base
from lightning_rlhf.models.sharding import writable
from lightning_rlhf.models.sharding_fsdp1 import vocabulary

ReferenceKind = Literal["base", "adapter", "model", "policy"]
REFERENCE_ADAPTER = "reference"


class Reference(nn.Module):
    """A frozen policy to stay close to.

    ===========  ==========================================================================
    ``base``     the policy's base with no adapter, where the policy starts as a fresh LoRA
    ``adapter``  a frozen copy of the adapter that the policy starts from, on the same base
    ``model``    a frozen model of its own, for full fine-tuning
    ``policy``   the policy itself, while it is still untrained: to score data once
    ===========  ==========================================================================

    Args:
        policy: The policy as it is before the first step; ``adapter`` and ``model`` copy it now.
        kind: How it is made; by default what fits the policy.
        model: Another model as the reference; it is frozen and not copied, and the kind is ``model``.

    Raises:
        ValueError: If the kind does not fit the policy.
    """

    def __init__(
        self,
        policy: LanguageModel,
        kind: ReferenceKind | None = None,
        model: LanguageModel | None = None,
    ) -> None:
        super().__init__()
        fitting = "model" if model is not None else reference_kind(policy)
        copied = (
            fitting == "base" and kind == "adapter"
        )  # a copy of a fresh adapter is the base, and may follow
        if kind not in (None, "model", "policy", fitting) and not copied:
            raise ValueError(f"reference {kind!r} does not fit this policy, whose reference is {fitting!r}")
        self.kind: ReferenceKind = kind or fitting
        # The policy is seen, not owned: it must not appear twice among the parameters.
        self._policy = (policy,)
        if self.kind == "model":
            self.model = (copy_model(policy) if model is None else model).requires_grad_(False)
        elif self.kind == "adapter" and isinstance(policy.model, PeftModel):
            copy_adapter(policy.model, REFERENCE_ADAPTER, trainable=False)

    @torch.no_grad()
    def follow(self) -> None:
        """Become the policy as it is now.

        Raises:
            ValueError: If the reference is the base or the policy itself, or a model of another architecture.
        """
        (policy,) = self._policy
        with writable(policy, self):
            self._copy(policy)

    def _copy(self, policy: LanguageModel) -> None:
        parameters = dict(policy.named_parameters())
        if self.kind == "model":
            pairs = {parameter: parameters.get(name) for name, parameter in self.model.named_parameters()}
        elif self.kind == "adapter":
            copies = {n: p for n, p in parameters.items() if f".{REFERENCE_ADAPTER}." in n}
            pairs = {
                p: parameters[n.replace(f".{REFERENCE_ADAPTER}.", f".{POLICY_ADAPTER}.")]
                for n, p in copies.items()
            }
        else:
            raise ValueError(f"a reference of kind {self.kind!r} has no weights of its own that could change")
        for parameter, source in pairs.items():
            if source is None or source.shape != parameter.shape:
                raise ValueError("the reference is another model than the policy and cannot become it")
            parameter.copy_(source)

    @property
    def language_models(self) -> tuple[LanguageModel]:
        """What computes: a model of its own, or the policy's."""
        return (self.model,) if self.kind == "model" else self._policy

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """The language model, in the reference's role."""
        (policy,) = self._policy
        if self.kind == "model":
            yield self.model
        elif self.kind == "policy":
            yield policy
        else:
            with policy.role(None if self.kind == "base" else REFERENCE_ADAPTER):
                yield policy

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-probabilities of the targets, ``(M,)``, in nats, without gradient."""
        with self.active() as model:
            return model(batch).logprobs

    @torch.no_grad()
    def compare(self, hidden: Tensor, batch: PackedBatch, *, temperature: float = 1.0) -> TokenComparison:
        """Policy and reference at every target, in one pass over the vocabulary of each, without gradient.

        Args:
            hidden: The policy's :meth:`~LanguageModel.hidden_states`, ``(M, d)``.
            batch: Prompt groups with completions.
            temperature: Divides the logits of both.

        Returns:
            Log-probabilities of both, the policy's entropy, and KL(policy‖reference), each ``(M,)``.
        """
        (policy,) = self._policy
        with self.active() as reference:
            ref_hidden = reference.hidden_states(batch)

        def ref_logits(hidden: Tensor) -> Tensor:
            with self.active() as reference:
                return reference.logits(hidden)

        with vocabulary(policy, *self.language_models):
            return compare_logprobs(
                hidden,
                policy.logits,
                ref_hidden,
                ref_logits,
                batch.targets,
                temperature=temperature,
                chunk_size=policy.chunk_size,
            )

    def forward(self, batch: PackedBatch) -> Tensor:
        """Log-probabilities of whole completions, ``(N,)``, in nats, without gradient."""
        return sum_by_sequence(self.logprobs(batch), batch.target_lengths)


def reference_kind(policy: LanguageModel) -> ReferenceKind:
    """The reference that equals a policy before its first step.

    Args:
        policy: Untrained.

    Returns:
        The kind; see :class:`Reference`.

    Raises:
        ValueError: If a fresh adapter's initialisation changed the base.
    """
    if not isinstance(policy.model, PeftModel):
        return "model"
    init = policy.model.peft_config[POLICY_ADAPTER].to_dict().get("init_lora_weights")
    if changes_base(init):
        raise ValueError(
            f"lora.init {init!r} changes the base, so that the base without adapter is a different model and no "
            "reference. Use init: default or gaussian, or train SFT with it and start from its exported, merged model"
        )
    return "base" if is_fresh(policy.model) else "adapter"
