"""Algorithms with a reference policy: how it is made, computed once where asked, and checked at step 0."""

from pathlib import Path

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.algorithms.base import Algorithm, as_policy
from lightning_rlhf.algorithms.optimization import Optimization
from lightning_rlhf.algorithms.reference_cache import ReferenceCache, summed
from lightning_rlhf.algorithms.strategies import require_storage
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models import Policy, Reference, load_language_model
from lightning_rlhf.models.language_model import disable_dropout


class Referenced(Algorithm):
    """Base of the algorithms that compare the policy with a reference.

    The reference is the policy as it starts: its base without the adapter for a fresh LoRA, a frozen copy of the
    adapter where it starts from one, a frozen copy of the model in full fine-tuning. That both agree at step 0 is
    asserted. Dropout is off in policy and reference.

    Args:
        policy: A path or Hub id, :class:`Policy` settings, or a built Transformers or PEFT model.
        tokenizer: Needed with a built model; else the policy's own.
        optimization: Optimizer and schedule.
        reference: Another model as the reference, by path or settings; it need not equal the policy at step 0.
        precompute_reference: Compute the reference's log-probabilities once, before training, and keep them on disk.
        cache_dir: Where they are kept, under a fingerprint of model, data and template.
    """

    ld_alpha: float = 1.0

    def __init__(
        self,
        policy: Policy | str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        optimization: Optimization | None,
        reference: Policy | str | None,
        precompute_reference: bool,
        cache_dir: str,
    ) -> None:
        super().__init__(policy, tokenizer, optimization)
        self.reference_settings = None if reference is None else as_policy(reference)[0]
        self.precompute_reference = precompute_reference
        self.reference: Reference | None = None
        self.reference_cache = (
            ReferenceCache(Path(cache_dir), self.ld_alpha) if precompute_reference else None
        )
        self._checked = False

    @property
    def needs_reference(self) -> bool:
        """Whether there is a reference at all."""
        return True

    def setup(self, stage: str) -> None:
        """Also refuse what a strategy cannot do with another reference."""
        super().setup(stage)
        if self.reference_settings is not None:
            require_storage(self.trainer, self.reference_settings.quantization, of="reference")

    def on_policy_loaded(self) -> None:
        """Make the reference from the untrained policy, where one is needed, and switch dropout off in both."""
        if self.needs_reference:
            if self.reference_cache is None or self.reference_settings is not None:
                self.reference = self.new_reference()
            else:
                self.reference_cache.remember(self.policy)
        # Last: an adapter or a model that the reference brings has a dropout of its own.
        disable_dropout(self)

    def new_reference(self) -> Reference:
        """The reference of the untrained policy, or the other model that was given."""
        if self.reference_settings is None:
            return Reference(self.policy)
        return Reference(self.policy, model=load_language_model(self.reference_settings))

    def on_fit_start(self) -> None:
        """Precompute the reference's log-probabilities, where asked."""
        if self.reference_cache is not None:
            scorer = self.reference or Reference(self.policy, kind=self.reference_cache.kind)
            self.reference_cache.prepare(scorer, self.trainer, ("train", "val"))

    def reference_logps(self, batch: PackedBatch, stage: str) -> Tensor:
        """Log-probabilities of the completions under the reference, ``(N,)``: computed now, or looked up."""
        if self.reference_cache is not None and stage in self.reference_cache:
            return self.reference_cache.lookup(stage, batch)
        if self.reference is None:
            raise ValueError(f"no reference log-probabilities for {stage!r}: set precompute_reference: false")
        return summed(self.reference.logprobs(batch), batch, self.ld_alpha)

    def _assert_equal_at_start(self, logps: Tensor, ref_logps: Tensor, batch: PackedBatch) -> None:
        """At step 0 policy and reference are the same model, so every log-ratio is 0 up to rounding."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return  # the policy may come from a checkpoint, and global_step does not
        self._checked = True
        if self.reference_settings is not None or self.global_step > 0:
            return
        gap = ((logps - ref_logps).abs() / batch.target_lengths.clamp(min=1)).max().item()
        if gap > (2e-2 if self._in_half(logps) else 1e-4):
            raise RuntimeError(
                f"at step 0 policy and reference differ by {gap:.3g} nats a token (KL should be 0): the reference is "
                "not the model that the policy starts from. Was the policy changed after the module was built, or is "
                "the cached reference of other weights (delete cache_dir)?"
            )

    def _in_half(self, computed: Tensor) -> bool:
        """Whether something was computed in half precision, so that numbers agree to a few hundredths only."""
        half = self.trainer.precision not in ("32-true", "64-true") or computed.dtype != torch.float32
        return half or any(p.dtype in (torch.bfloat16, torch.float16) for p in self.policy.parameters())
