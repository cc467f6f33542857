"""What ``lightning-rlhf doctor`` shows of an algorithm that samples."""

import lightning as L
from rich.table import Table
from rich.text import Text

from lightning_rlhf.algorithms import PPO
from lightning_rlhf.algorithms.online import Online
from lightning_rlhf.cli.doctor_tables import made_how, plain_table, report_lines, running_table
from lightning_rlhf.cli.tokens import Example, render
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack

SHOWN = (
    "objective/kl",
    "objective/scores",
    "objective/entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "policy/approxkl_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "loss",
    "pairs/tied",
    "time/generation_share",
)


def prompt_tokens(batch: PromptBatch, module: Online) -> Text:
    """The first prompt of a batch as its tokens."""
    return render(Example(batch.row_ids[0], list(batch.prompt_ids[0]), []), module.tokenizer)


def prompt_tables(trainer: L.Trainer, batch: PromptBatch) -> list[Table]:
    """What was read, cut and dropped, and how long prompts are."""
    rows = plain_table("data")
    for name, value in report_lines(trainer.datamodule):  # type: ignore[attr-defined]
        rows.add_row(name, value)
    lengths = [len(ids) for ids in batch.prompt_ids]
    sizes = plain_table("one batch of prompts")
    sizes.add_row("prompts", f"{len(batch)}")
    sizes.add_row(
        "tokens of a prompt", f"{sum(lengths) / len(lengths):.1f} on average, {max(lengths)} at most"
    )
    sizes.add_row("columns for rewards", ", ".join(batch.columns) or "none")
    return [rows, sizes]


def rollout_facts(trainer: L.Trainer, module: Online, batch: PromptBatch) -> Table:
    """Precision, layout, optimizer, sampling, reward and reference."""
    table = running_table(trainer, module, as_packed(batch))
    count = len(batch) * module.sampling.num_samples
    table.add_row(
        "a rollout",
        f"{len(batch)} prompts, {count} completions on each of {trainer.world_size} processes",
    )
    if isinstance(module, PPO):
        steps = module.update.num_epochs * -(-count // module.update.minibatch_size)
        table.add_row(
            "optimizer steps a rollout",
            f"{steps}: max_steps and every_n_train_steps should be multiples of it",
        )
        table.add_row("advantages", str(module.estimator))
        if module.estimator.needs_values:
            table.add_row("critic", module.critic.kind)
    table.add_row("sampling", str(module.sampling))
    table.add_row("reward", ", ".join(module.reward.part_names))
    assert module.reference is not None
    table.add_row("reference", made_how(module, module.reference))
    return table


def as_packed(batch: PromptBatch) -> PackedBatch:
    """Prompts with a completion of one token each, to ask a model about its layout."""
    return pack(
        PromptGroup(ids, [ids[-1:]], row_id=row)
        for ids, row in zip(batch.prompt_ids, batch.row_ids, strict=True)
    )
