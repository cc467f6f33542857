"""What every competitor computes: the same model, the same batches, and how much arithmetic that is."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_rlhf.data.packing import PackedBatch, PromptGroup, Segment

Task = Literal["dpo", "sft", "reward", "kto", "ranked", "ppo_model", "ppo_adapter", "generation"]
VOCABULARY = 49_152
HIDDEN = 512
INTERMEDIATE = 1_408
LAYERS = 10
HEADS = 8
BATCH_SIZE = 8
BETA = 0.1
LEARNING_RATE = 1e-5

TRAINED, FORWARD = 6, 2
"""FLOPs a weight and token: a forward and backward pass, and a forward pass alone."""

PASSES: dict[Task, int] = {
    "dpo": TRAINED + FORWARD,
    "sft": TRAINED,
    "reward": TRAINED,
}
"""Over policy and reference."""


@dataclass(frozen=True)
class Workload:
    """Batches of a task: lists of prompt groups."""

    task: Task
    batches: list[list[PromptGroup]]


def llama() -> Any:
    """A random Llama of 57M parameters, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=2_048,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def score_weights() -> Any:
    """Weights of a reward model's head, ``(1, HIDDEN)``, the same in every process."""
    import torch

    return torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0)) / HIDDEN**0.5


def load(task: Task, assets: Path, count: int, seed: int = 0) -> Workload:
    """Batches of real rows, tokenised by GPT-2's tokenizer; ids wrap around the vocabulary, lengths are real."""
    from transformers import AutoTokenizer

    from lightning_rlhf.data import load_rows, tokenize_preference, tokenize_sft, tokenize_unpaired
    from lightning_rlhf.data.collate import group_of

    rows = load_rows(
        assets / ("sft/gsm8k_train.jsonl.gz" if task == "sft" else "preferences/hh_helpful_train.jsonl.gz")
    )
    if task == "sft":
        rows = rows.rename_columns({"question": "prompt", "answer": "completion"})
    picked = random.Random(seed).sample(range(len(rows)), min(len(rows), 2 * BATCH_SIZE * count))
    tokenizer = AutoTokenizer.from_pretrained(assets / "gpt2-tokenizer")
    tokenize: Any = {"sft": tokenize_sft, "kto": tokenize_unpaired}.get(task, tokenize_preference)
    tokenized, _ = tokenize(rows.select(picked), tokenizer, max_length=1_024, on_bad_row="drop")
    groups = [_wrapped(group_of(row)) for row in tokenized]
    if task == "kto":  # as training shuffles: the answers of a pair stand side by side
        random.Random(seed).shuffle(groups)
    batches = [groups[at : at + BATCH_SIZE] for at in range(0, len(groups), BATCH_SIZE)][:count]
    return Workload(task, [batch for batch in batches if len(batch) == BATCH_SIZE])


def load_prompts(assets: Path, count: int, num_prompts: int, seed: int = 0) -> list[list[PromptGroup]]:
    """Batches of real prompts to be answered; no id is one of the three special ones, which TRL's masks go by."""
    from transformers import AutoTokenizer

    from lightning_rlhf.data import load_rows, tokenize_prompts

    rows = load_rows(assets / "preferences/hh_helpful_train.jsonl.gz").select_columns(["prompt"])
    picked = random.Random(seed).sample(range(len(rows)), min(len(rows), 2 * num_prompts * count))
    tokenizer = AutoTokenizer.from_pretrained(assets / "gpt2-tokenizer")
    tokenized, _ = tokenize_prompts(rows.select(picked), tokenizer, max_length=1_024, on_bad_row="drop")
    groups = [
        PromptGroup([3 + token % (VOCABULARY - 3) for token in row["prompt_ids"]], [], row_id=row["row_id"])
        for row in tokenized
    ]
    return [groups[at : at + num_prompts] for at in range(0, count * num_prompts, num_prompts)]


def _wrapped(group: PromptGroup) -> PromptGroup:
    return PromptGroup(
        [token % VOCABULARY for token in group.prompt],
        [[token % VOCABULARY for token in completion] for completion in group.completions],
        row_id=group.row_id,
        extras=group.extras,
    )


def ranked(pairs: Workload, num_completions: int, batch_size: int) -> Workload:
    """Prompts with ranked completions, whose lengths are those of real answers to other prompts."""
    pool = [completion for batch in pairs.batches for group in batch for completion in group.completions]
    draw = random.Random(num_completions)
    batches = [
        [
            PromptGroup(
                group.prompt,
                draw.sample(pool, num_completions),
                row_id=group.row_id,
                ranks=[float(rank) for rank in range(num_completions)],
            )
            for group in batch[:batch_size]
        ]
        for batch in pairs.batches
    ]
    return Workload("ranked", batches)


def num_terms(batch: PackedBatch, task: Task) -> int:
    """What our loss is a sum over: tokens, or prompts."""
    return len(batch.targets) if task == "sft" else batch.num_groups


def model_flops(batch: PackedBatch, task: Task) -> float:
    """Arithmetic that the packed batch needs, recomputation not counted.

    Args:
        batch: The batch.
        task: Says whether there is a reference, and whether the vocabulary is needed.

    Returns:
        Weights of the layers on every token, causal attention, and the head on positions that predict a target.
    """
    if task == "kto":  # nothing is learnt from the mismatched completions
        learned, others = batch.parts(1)
        first = sum(n for n, flag in zip(batch.num_targets, batch.are_first(1), strict=True) if flag)
        return (TRAINED + FORWARD) * _weights(learned.segments, first) + 2 * FORWARD * _weights(
            others.segments, len(batch.targets) - first
        )
    return float(PASSES[task]) * _weights(batch.segments, 0 if task == "reward" else len(batch.targets))


def _weights(segments: Sequence[Segment], num_targets: int) -> float:
    """Products of a weight and a number, and of two numbers in attention, in one forward."""
    body = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    tokens = seen = 0
    for segment in segments:
        length, prompt = segment.end - segment.start, segment.prompt_end - segment.prompt_start
        tokens += length
        seen += length * prompt + length * (length + 1) // 2
    # a multiplication of queries and keys, and one of weights and values
    attention = LAYERS * 2 * HIDDEN * seen
    return float(body * tokens + attention + HIDDEN * VOCABULARY * num_targets)
