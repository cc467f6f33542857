"""Reference log-probabilities computed once and kept on disk."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf import functional as RF
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models import LanguageModel, Reference
from lightning_rlhf.models.language_model import is_adapter
from lightning_rlhf.models.reference import ReferenceKind, reference_kind
from lightning_rlhf.models.sharding import gathered


class ReferenceCache:
    """Log-probabilities of every completion of a data set under the reference, by row.

    Kept in ``directory/<fingerprint>.pt``, where the fingerprint covers the reference's weights, the data and the
    template: whatever changes one of them computes them anew.

    Args:
        directory: Made where it is missing.
        ld_alpha: Weight of the tokens past the shorter completion's length; with 1, any number of completions.
    """

    def __init__(self, directory: Path, ld_alpha: float = 1.0) -> None:
        self.directory = directory
        self.ld_alpha = ld_alpha
        self.fingerprint = ""
        self.kind: ReferenceKind = "model"
        self._logps: dict[str, Tensor] = {}

    def remember(self, policy: LanguageModel) -> None:
        """Note the weights of the untrained policy, before a checkpoint is loaded into it."""
        # A base needs no copy and no state: it scores at any time. Else the untrained policy scores, before step 1.
        self.kind = "base" if reference_kind(policy) == "base" else "policy"
        self.fingerprint = weights_fingerprint(policy, without_adapter=self.kind == "base")

    def __contains__(self, split: str) -> bool:
        """Whether a split was prepared."""
        return split in self._logps

    def lookup(self, split: str, batch: PackedBatch) -> Tensor:
        """The stored log-probabilities of a batch's completions, ``(N,)``, on its device."""
        return self._logps[split][list(batch.row_ids)].flatten().to(batch.input_ids.device)

    def prepare(self, reference: Reference, trainer: Any, splits: Iterable[str]) -> None:  # noqa: ANN401
        """Load the log-probabilities of some splits, or compute and save them.

        Every process scores its share of the batches.

        Args:
            reference: Scores what is not on disk.
            trainer: Whose datamodule holds the data.
            splits: Names; those without data are left out.

        Raises:
            ValueError: If there is no datamodule, or training is resumed and the file is gone.
        """
        if trainer.datamodule is None:
            raise ValueError(
                "precompute_reference needs the data by a datamodule, trainer.fit(module, datamodule=…): row ids "
                "of a plain DataLoader say nothing about its data"
            )
        with gathered(*reference.language_models):
            self._prepare(reference, trainer, splits)

    def _prepare(self, reference: Reference, trainer: Any, splits: Iterable[str]) -> None:  # noqa: ANN401
        data = trainer.datamodule
        weights = self.fingerprint or weights_fingerprint(reference.model, without_adapter=False)
        if self.ld_alpha != 1.0:
            weights += f"ld_alpha={self.ld_alpha}"
        for split in splits:
            if split not in data.datasets:
                continue
            path = (
                self.directory
                / f"{hashlib.sha256((weights + data.fingerprint(split)).encode()).hexdigest()[:32]}.pt"
            )
            if not path.exists():
                if trainer.ckpt_path is not None and reference.kind == "policy":
                    raise ValueError(
                        f"resuming needs the reference log-probabilities in {path}, which are gone; the policy in the "
                        "checkpoint is no longer the reference. Set precompute_reference: false"
                    )
                logps = self._compute(reference, trainer, split)
                if trainer.is_global_zero:
                    save_atomically(logps, path)
                self._logps[split] = logps
            else:
                self._logps[split] = torch.load(path, weights_only=True)
            trainer.strategy.barrier("reference log-probabilities")

    def _compute(self, reference: Reference, trainer: Any, split: str) -> Tensor:  # noqa: ANN401
        data = trainer.datamodule
        device = trainer.strategy.root_device
        table: Tensor | None = None
        for index, batch in enumerate(data.evaluation_loader(split)):
            if index % trainer.world_size != trainer.global_rank:
                continue
            logps = summed(reference.logprobs(batch.to(device)), batch, self.ld_alpha).view(
                batch.num_groups, -1
            )
            if table is None:
                table = torch.zeros(len(data.datasets[split]), logps.shape[1], device=device)
            table[list(batch.row_ids)] = logps.float()
        return trainer.strategy.reduce(table, reduce_op="sum").cpu()


def summed(logprobs: Tensor, batch: PackedBatch, ld_alpha: float) -> Tensor:
    """Log-probabilities of whole completions, ``(N,)``, from those of tokens; plain sums where ``ld_alpha`` is 1."""
    lengths = batch.target_lengths.to(logprobs.device)
    if ld_alpha == 1.0:
        return RF.sum_by_sequence(logprobs, lengths)
    return RF.length_desensitized_sum(logprobs, lengths, ld_alpha=ld_alpha)


def weights_fingerprint(model: LanguageModel, *, without_adapter: bool) -> str:
    """A hash of a model's weights and configuration.

    Args:
        model: Any model.
        without_adapter: Leave adapters out: a fresh one changes nothing and is random.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, parameter in model.named_parameters():
        if without_adapter and is_adapter(name):
            continue
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_atomically(value: Tensor, path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    torch.save(value, partial)
    partial.replace(path)
