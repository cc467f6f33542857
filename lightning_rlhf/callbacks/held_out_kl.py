"""How far the policy is from its reference on its own samples for held-out prompts."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_rlhf.algorithms import DPO
from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from lightning_rlhf.functional import kl_k3, sum_by_sequence
from lightning_rlhf.generation import Sampling, generate
from lightning_rlhf.models import Reference
from lightning_rlhf.models.sharding import gathered


class HeldOutKL(Callback):
    r"""Log ``val/kl``: KL(π‖π_ref) of whole completions on the prompts of the validation data, in nats.

    After each validation the policy answers the first prompts, and the k3 estimate
    $\sum_t e^{-\Delta_t} - 1 + \Delta_t$, $\Delta_t = \log \pi(y_t) - \log \pi_{ref}(y_t)$, is averaged over the
    answers (Schulman, 2020); see :func:`lightning_rlhf.functional.kl_k3`. The mean log-ratio on the data's own
    completions, ``rewards/chosen`` / β, is no KL: the policy did not write them. Training's random numbers are left
    as they were.

    Args:
        num_prompts: Prompts a process, the first of its validation data.
        max_new_tokens: Tokens of an answer at most; a cut answer counts as far as it goes.
        seed: Of the samples, the same at each validation.
        batch_size: Prompts at a time.

    Raises:
        ValueError: At the start, if the module has no reference to compare with.
    """

    def __init__(
        self, num_prompts: int = 32, max_new_tokens: int = 128, seed: int = 0, batch_size: int = 32
    ) -> None:
        self.num_prompts = num_prompts
        # At temperature 1 and without truncation: the KL is that of the policy itself.
        self.sampling = Sampling(max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.seed = seed
        self._prompts: list[list[int]] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with no prompt."""
        if not isinstance(pl_module, DPO) or pl_module.reference is None:
            raise ValueError(
                "HeldOutKL compares samples with the module's reference, and there is none: use an objective with a "
                "reference and precompute_reference: false, or leave HeldOutKL out"
            )
        self._prompts = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: PackedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep prompts until there are enough."""
        if len(self._prompts) < self.num_prompts:
            self._prompts += prompts_of(batch)[: self.num_prompts - len(self._prompts)]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, score under both models and log."""
        if trainer.sanity_checking or not self._prompts:
            return
        assert isinstance(pl_module, DPO)
        device = pl_module.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            kl = sampled_kl(pl_module, self._prompts, self.sampling)
        pl_module.log("val/kl", kl.mean(), sync_dist=True, batch_size=1)


def prompts_of(batch: PackedBatch) -> list[list[int]]:
    """The prompts of a batch as token ids.

    Example:
        >>> prompts_of(pack([PromptGroup([5, 6], [[7], [8, 9]]), PromptGroup([4], [[7]])]))
        [[5, 6], [4]]
    """
    ids, prompts, start = batch.input_ids.tolist(), [], 0
    for length, completions in zip(batch.prompt_lengths, batch.completion_lengths, strict=True):
        prompts.append(ids[start : start + length])
        start += length + sum(completions)
    return prompts


@torch.no_grad()
def sampled_kl(module: DPO, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Tensor:
    """The k3 estimate for each sampled completion, ``(N,)``, in nats; the module has a reference."""
    assert module.reference is not None
    with gathered(module.policy, *module.reference.language_models):
        return torch.cat(_estimates(module, module.reference, prompts, sampling))


def _estimates(
    module: DPO, reference: Reference, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[Tensor]:
    samples = list(generate(module.policy, module.tokenizer, prompts, sampling))
    estimates = []
    for start in range(0, len(samples), sampling.batch_size):
        groups = (
            PromptGroup(of_prompt[0].prompt, [c.tokens for c in of_prompt])
            for of_prompt in samples[start : start + sampling.batch_size]
        )
        batch = pack(groups).to(module.device)
        tokens = kl_k3(module.policy(batch).logprobs, reference.logprobs(batch))
        estimates.append(sum_by_sequence(tokens, batch.target_lengths))
    return estimates
