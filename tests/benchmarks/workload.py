"""What every competitor computes: the same model, the same batches, and how much arithmetic that is."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_rlhf.data.packing import PackedBatch, PromptGroup

Task = Literal["dpo", "sft"]
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


def load(task: Task, assets: Path, count: int, seed: int = 0) -> Workload:
    """Batches of real rows, tokenised by GPT-2's tokenizer; ids wrap around the vocabulary, lengths are real."""
    from transformers import AutoTokenizer

    from lightning_rlhf.data import load_rows, tokenize_preference, tokenize_sft
    from lightning_rlhf.data.collate import group_of

    path = "preferences/hh_helpful_train.jsonl.gz" if task == "dpo" else "sft/gsm8k_train.jsonl.gz"
    rows = load_rows(assets / path)
    if task == "sft":
        rows = rows.rename_columns({"question": "prompt", "answer": "completion"})
    picked = random.Random(seed).sample(range(len(rows)), min(len(rows), 2 * BATCH_SIZE * count))
    tokenizer = AutoTokenizer.from_pretrained(assets / "gpt2-tokenizer")
    tokenize = tokenize_preference if task == "dpo" else tokenize_sft
    tokenized, _ = tokenize(rows.select(picked), tokenizer, max_length=1_024, on_bad_row="drop")
    groups = [_wrapped(group_of(row)) for row in tokenized]
    batches = [groups[at : at + BATCH_SIZE] for at in range(0, len(groups), BATCH_SIZE)][:count]
    return Workload(task, [batch for batch in batches if len(batch) == BATCH_SIZE])


def _wrapped(group: PromptGroup) -> PromptGroup:
    return PromptGroup(
        [token % VOCABULARY for token in group.prompt],
        [[token % VOCABULARY for token in completion] for completion in group.completions],
        row_id=group.row_id,
    )


def model_flops(batch: PackedBatch, passes: int) -> float:
    """Arithmetic that the packed batch needs, recomputation not counted.

    Args:
        batch: The batch.
        passes: FLOPs a weight and token, over policy and reference.

    Returns:
        Weights of the layers on every token, causal attention, and the head on positions that predict a target.
    """
    body = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    seen = 0
    for segment in batch.segments:
        length, prompt = segment.end - segment.start, segment.prompt_end - segment.prompt_start
        seen += length * prompt + length * (length + 1) // 2
    attention = (
        LAYERS * 2 * HIDDEN * seen
    )  # a multiplication of queries and keys, and one of weights and values
    head = HIDDEN * VOCABULARY * len(batch.targets)
    return float(passes) * (body * len(batch.input_ids) + attention + head)
