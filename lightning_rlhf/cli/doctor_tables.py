"""The tables of ``lightning-rlhf doctor``."""

import math
import re
from typing import Any

import lightning as L
import torch
from rich.table import Table

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms import DPO
from lightning_rlhf.algorithms.base import Algorithm
from lightning_rlhf.algorithms.online import Online
from lightning_rlhf.algorithms.referenced import Referenced
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models.critic import VALUE_ADAPTER
from lightning_rlhf.models.language_model import is_adapter
from lightning_rlhf.models.reference import REFERENCE_ADAPTER, Reference


def data_tables(trainer: L.Trainer, batch: PackedBatch) -> list[Table]:
    """What was read, cut and dropped, and how much of a batch would be padding."""
    rows = plain_table("data")
    for name, value in report_lines(trainer.datamodule):  # type: ignore[attr-defined]
        rows.add_row(name, value)
    padded = batch.num_completions * batch.max_positions
    whole = sum(
        (p + c)
        for p, several in zip(batch.prompt_lengths, batch.completion_lengths, strict=True)
        for c in several
    )
    computed = batch.input_ids.numel()
    sizes = plain_table("one micro-batch")
    sizes.add_row("prompts, completions", f"{batch.num_groups}, {batch.num_completions}")
    sizes.add_row("tokens computed", f"{computed:,}, each prompt once, without padding")
    sizes.add_row("one row a completion", f"{whole:,} tokens ({whole / computed:.2f} times as many)")
    sizes.add_row("the same, padded", f"{padded:,} tokens ({padded / computed:.2f} times as many)")
    sizes.add_row("tokens learned from", f"{batch.targets.numel():,}")
    sizes.add_row("longest prompt + completion", f"{batch.max_positions:,} tokens")
    return [rows, sizes]


def report_lines(datamodule: Any) -> list[tuple[str, str]]:  # noqa: ANN401 - any datamodule
    """Counts of a datamodule's splits as pairs of words; of another's only that there are none."""
    report = getattr(datamodule, "report", None)
    if not report:
        return [("report", "none: not a datamodule of lightning_rlhf")]
    return [(str(split), str(counts)) for split, counts in report.items()]


def roles_table(module: Algorithm) -> Table:
    """Parameters, trainable ones and dtypes by role."""
    table = Table(
        "role", "parameters", "trainable", "dtypes", title="parameters by role", title_justify="left"
    )
    roles: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        roles.setdefault(role_of(name), []).append(parameter)
    for role, parameters in (roles | reward_roles(module)).items():
        trainable = sum(_size(p) for p in parameters if p.requires_grad)
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        table.add_row(role, f"{sum(map(_size, parameters)):,}", f"{trainable:,}", dtypes)
    return table


def reward_roles(module: Algorithm) -> dict[str, list[torch.nn.Parameter]]:
    """Parameters of the frozen models that a reward holds, as far as they are not the policy's own."""
    if not isinstance(module, Online):
        return {}
    own = {id(p) for p in module.parameters()}
    return {
        f"reward {name}": several
        for name, model in module.reward.held()
        if (several := [p for p in model.parameters() if id(p) not in own])
    }


def role_of(name: str) -> str:
    """The role of a module's parameter.

    Example:
        >>> role_of("policy.model.lm_head.weight"), role_of("reference.model.lm_head.weight")
        ('policy', 'reference')
        >>> role_of("policy.model.q.lora_A.reference.weight"), role_of("policy.model.q.lora_A.default.weight")
        ('reference adapter', 'policy adapter')
        >>> role_of("policy.model.q.lora_A.value.weight"), role_of("critic.head.weight")
        ('value adapter', 'critic')
    """
    first = name.split(".", 1)[0]
    if not is_adapter(name):
        return first
    adapter = next((a for a in (REFERENCE_ADAPTER, VALUE_ADAPTER) if f".{a}." in name), None)
    shared = re.search(r"\.(reward_\w+)\.", name)
    return f"{adapter or (shared[1] if shared else first)} adapter"


def _size(parameter: torch.nn.Parameter) -> int:
    # A 4-bit parameter holds two or more weights in an element; its state knows the shape.
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def facts_table(trainer: L.Trainer, module: Algorithm, batch: PackedBatch, *, precomputes: bool) -> Table:
    """Precision, layout, reference and optimizer."""
    window = trainer.accumulate_grad_batches
    table = running_table(trainer, module, batch)
    table.add_row(
        "groups an optimizer step",
        f"about {batch.num_groups * window * trainer.world_size} (accumulating {window})",
    )
    if isinstance(module, Referenced) and module.reference is not None:
        table.add_row(
            "reference",
            made_how(module, module.reference)
            + (", computed once before training and kept on disk" if precomputes else ""),
        )
        table.add_row("KL at step 0", kl_at_start(module, module.reference, batch))
    else:
        whose = type(module.objective if isinstance(module, DPO) else module).__name__
        table.add_row("reference", f"none: {whose} needs none")
    return table


def running_table(trainer: L.Trainer, module: Algorithm, batch: PackedBatch) -> Table:
    """The beginning of every table of facts: precision, layout and optimizer."""
    table = plain_table("how it will run")
    table.add_row("precision", f"{trainer.precision} on {module.device}")
    table.add_row("layout", f"{module.policy.layout_of(batch)}: {module.policy.layout_reason}")
    table.add_row("optimizer", str(module.optimization))
    return table


REFERENCES = {
    "base": "the policy's base without its adapter (no memory of its own)",
    "adapter": "a frozen copy of the adapter the policy starts from, on the same base",
    "model": "a frozen copy of the policy",
    "policy": "the untrained policy",
}


def made_how(module: Referenced, reference: Reference) -> str:
    """How a reference is made, in words."""
    return "another model, given by reference" if module.reference_settings else REFERENCES[reference.kind]


@torch.no_grad()
def kl_at_start(module: Referenced, reference: Reference, batch: PackedBatch) -> str:
    """How far policy and reference are apart on a batch, in words: 0 up to rounding."""
    logps = RF.sum_by_sequence(module.policy(batch).logprobs, batch.target_lengths)
    gap = logps - reference(batch)
    return (
        f"{gap.mean().item():.2g} nats a completion (mean of log π − log π_ref on {len(gap)} completions of the data; "
        f"largest {gap.abs().max().item():.2g})"
    )


def plain_table(title: str) -> Table:
    """Pairs of words under a title."""
    return Table(title=title, title_justify="left", show_header=False, min_width=60)
