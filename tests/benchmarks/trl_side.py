"""TRL's side of what is compared: the steps of its trainers, in the settings that may be fastest."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from lightning_rlhf.data.packing import pack
from tests.benchmarks.competitors import Groups, NextBatch, Report, adamw
from tests.benchmarks.workload import BETA, Task, llama, num_terms, score_weights

PADDED: dict[str, dict[str, Any]] = {
    "padded, sdpa": {},
    "padded, eager attention": {"attention": "eager"},
    "padded, sdpa, activation checkpointing": {"activation_checkpointing": True},
}
# TRL 1.16 with what makes it slower switched off. ``padding_free`` is refused by its DPO ("temporarily unavailable"),
# and its trainers of reward models and of KTO have none. Of packing, ``wrapped`` lets documents see each other and cuts
# them, which is other work.
TRL_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "dpo": PADDED,
    "reward": PADDED,
    "kto": PADDED,
    "sft": {
        "padded, sdpa": {},
        "padding_free, sdpa": {"padding_free": True, "max_length": None},
        "packing bfd 1024, sdpa": {"packing": True, "packing_strategy": "bfd"},
    },
}


def trl_step(
    task: Task, precision: str, setting: str, next_batch: NextBatch, done: Callable[[Report], None]
) -> None:
    """TRL's ``compute_loss``, backward and the same optimizer, in one of its settings."""
    from trl.trainer.utils import disable_dropout_in_model

    settings = dict(TRL_SETTINGS[task][setting])
    model = _reward_model() if task == "reward" else llama()
    model.set_attn_implementation(settings.pop("attention", "sdpa"))
    trainer = _trainer(task, model, precision, settings)
    disable_dropout_in_model(model)
    model.train()
    wrapped = trainer.accelerator.prepare_model(model)
    optimizer = adamw(model)

    def collate(groups: Groups) -> tuple[dict[str, Any], int]:
        rows = ROWS[task](groups)
        if settings.get("packing"):
            rows = _packed(rows, trainer.args)
        # TRL's loss is a mean, ours a sum that the optimizer's hook divides: reported alike.
        return trainer._prepare_inputs(trainer.data_collator(rows)), num_terms(pack(groups), task)

    while True:
        inputs, count = next_batch(collate)
        # A mismatched completion stands in a row of its own, with its prompt once more.
        num_tokens = sum(inputs[name].numel() for name in ("input_ids", "KL_input_ids") if name in inputs)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(wrapped, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done((loss.item() * count, num_tokens))


def _reward_model() -> Any:
    """The same weights as ours under a head that starts as ours does."""
    from transformers import LlamaForSequenceClassification

    base: Any = llama()
    base.config.num_labels = 1
    model: Any = LlamaForSequenceClassification(base.config)
    model.model = base.model
    model.score.weight.data.copy_(score_weights())
    return model


def _trainer(task: Task, model: Any, precision: str, settings: dict[str, Any]) -> Any:
    import trl
    from datasets import Dataset

    from tests.tokenizers import letters

    common = {
        "output_dir": tempfile.mkdtemp(prefix="benchmark-"),
        "report_to": [],
        "use_cpu": True,
        "bf16": precision == "bf16-mixed",
        "activation_checkpointing": False,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        **settings,
    }
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    answer = {"prompt": "a", "completion": "b"}
    models, row, trainer, args = {
        "dpo": lambda: ([model, _reference(model)], pair, trl.DPOTrainer, trl.DPOConfig(beta=BETA, **common)),
        "kto": lambda: (
            [model, _reference(model)],
            {**answer, "label": True},
            trl.KTOTrainer,
            trl.KTOConfig(beta=BETA, **common),
        ),
        "reward": lambda: ([model], pair, trl.RewardTrainer, trl.RewardConfig(**common)),
        "sft": lambda: ([model], answer, trl.SFTTrainer, trl.SFTConfig(**common)),
    }[task]()
    rows = Dataset.from_list([row] * 2)
    return trainer(*models, args=args, train_dataset=rows, processing_class=letters())


def _reference(model: Any) -> Any:
    return copy.deepcopy(model).requires_grad_(False)


def _pairs(groups: Groups) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": g.prompt, "chosen_ids": g.completions[0], "rejected_ids": g.completions[1]}
        for g in groups
    ]


def _whole_pairs(groups: Groups) -> list[dict[str, Any]]:
    return [
        {"chosen_ids": [*g.prompt, *g.completions[0]], "rejected_ids": [*g.prompt, *g.completions[1]]}
        for g in groups
    ]


def _answers(groups: Groups) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": g.prompt,
            "completion_ids": g.completions[0],
            "KL_completion_ids": g.completions[1],
            "label": g.extras["label"] == 1,
        }
        for g in groups
    ]


def _demonstrations(groups: Groups) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": [*g.prompt, *g.completions[0]],
            "labels": [-100] * len(g.prompt) + list(g.completions[0]),
        }
        for g in groups
    ]


ROWS: dict[str, Callable[[Groups], list[dict[str, Any]]]] = {
    "dpo": _pairs,
    "reward": _whole_pairs,
    "kto": _answers,
    "sft": _demonstrations,
}


def _packed(rows: list[dict[str, Any]], args: Any) -> list[dict[str, Any]]:
    import trl
    from datasets import Dataset

    packed: Iterator[dict[str, Any]] = iter(
        trl.pack_dataset(Dataset.from_list(rows), args.max_length, args.packing_strategy)
    )
    return list(packed)
