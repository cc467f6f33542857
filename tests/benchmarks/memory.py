"""Predicted memory beside the peak of a process: ``python -m tests.benchmarks.memory [--only NAME …]``.

Every training runs in a fresh process on the CPU, of a random Llama, with rows that are all as long as they may be.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 2**20
# One arena, and whatever is not small from the system and back to it: what is resident is then what is alive.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LLAMA = {
    "vocab_size": 16_000,
    "hidden_size": 640,
    "intermediate_size": 1_728,
    "num_hidden_layers": 6,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "max_position_embeddings": 2_048,
    "tie_word_embeddings": False,
}
TINY = {**LLAMA, "hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 1}
LORA = {"model.policy.lora.r": 16}
NF4 = {**LORA, "model.policy.quantization.bits": 4}
CHECKPOINTED = {"model.policy.gradient_checkpointing": "true"}
MIXED = {"trainer.precision": "bf16-mixed"}
PAIRS = ("PreferenceDataModule", "pairs.jsonl")


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        name: In the table.
        algorithm: Name of its class.
        rows: Prompts a batch.
        prompt: Tokens of each.
        completion: Tokens of each completion.
        flags: What else is set.
    """

    name: str
    algorithm: str
    rows: int
    prompt: int
    completion: int
    flags: dict[str, object]

    @property
    def data(self) -> tuple[str, str]:
        """Datamodule and file."""
        others = {"SFT": ("SFTDataModule", "sft.jsonl"), "KTO": ("UnpairedDataModule", "pairs.jsonl")}
        samples = ("PromptDataModule", "pairs.jsonl")
        return others.get(self.algorithm, samples if self.algorithm in ("PPO", "OnlineDPO") else PAIRS)

    def arguments(self, policy: Path, reward: Path) -> list[str]:
        """Of ``fit`` and of ``memory``."""
        module, file = self.data
        length = self.prompt + self.completion
        flags: dict[str, object] = {
            "model": self.algorithm,
            "model.policy.path": policy,
            "data": module,
            "data.train": policy.parent / f"{self.prompt}-{self.completion}-{file}",
            "data.batch_size": self.rows,
            "data.max_length": length,
            "data.max_prompt_length": self.prompt,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": 2,
            "trainer.logger": "false",
            "trainer.enable_checkpointing": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "model.optimization.schedule": "constant",
        }
        if module == "PromptDataModule":
            flags |= {"model.reward": "RewardModelReward", "model.reward.model": reward}
            flags |= {"model.sampling.max_new_tokens": self.completion}
        flags |= self.flags
        return [f"--{name}={value}" for name, value in flags.items()]


PPO = {
    "model.update.num_epochs": 1,
    "model.update.minibatch_size": 8,
    "model.update.micro_batch_size": 4,
}
CASES = [
    Case("SFT, full", "SFT", 4, 128, 128, {}),
    Case("SFT, full, bf16-mixed, checkpointing", "SFT", 8, 64, 64, {**MIXED, **CHECKPOINTED}),
    Case("SFT, LoRA, long rows", "SFT", 1, 256, 768, LORA),
    Case("SFT, nf4 LoRA, bf16-true", "SFT", 4, 128, 128, {**NF4, "trainer.precision": "bf16-true"}),
    Case("DPO, full", "DPO", 2, 128, 128, {}),
    Case("DPO, full, bf16-mixed", "DPO", 2, 128, 128, MIXED),
    Case("DPO, full, 8-bit AdamW", "DPO", 2, 128, 128, {"model.optimization.name": "adamw_8bit"}),
    Case("DPO, LoRA", "DPO", 4, 128, 128, LORA),
    Case("DPO, LoRA, checkpointing", "DPO", 4, 128, 128, {**LORA, **CHECKPOINTED}),
    Case("DPO, nf4 LoRA, checkpointing", "DPO", 4, 128, 128, {**NF4, **CHECKPOINTED}),
    Case("DPO, full, padded layout", "DPO", 2, 128, 128, {"model.policy.layout": "padded"}),
    Case("KTO, full, accumulated", "KTO", 4, 64, 64, {"trainer.accumulate_grad_batches": 2}),
    Case("KTO, LoRA, bf16-mixed", "KTO", 4, 128, 128, {**LORA, **MIXED}),
    Case("RewardModel, full", "RewardModel", 4, 64, 128, {}),
    Case("RewardModel, ensemble of 3, LoRA", "RewardModel", 2, 64, 128, {**LORA, "model.num_members": 3}),
    Case("PPO, full, critic a model", "PPO", 8, 64, 48, PPO),
    Case("PPO, LoRA, critic an adapter", "PPO", 8, 128, 48, {**PPO, **LORA}),
    Case("PPO, nf4 LoRA, checkpointing", "PPO", 8, 256, 32, {**PPO, **NF4, **CHECKPOINTED}),
    Case("OnlineDPO, LoRA", "OnlineDPO", 4, 128, 48, {**LORA, "model.sampling.num_samples": 2}),
]


def make(folder: Path, llama: dict[str, object] = LLAMA) -> None:
    """Random models, and rewards of the same shapes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from tests.tokenizers import letters

    torch.manual_seed(0)
    for name, shape in (("policy", llama), ("tiny", TINY)):
        config = LlamaConfig(**shape, pad_token_id=0)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        config.num_labels = 1
        LlamaForSequenceClassification(config).save_pretrained(folder / f"{name}-reward")
        for path in (folder / name, folder / f"{name}-reward"):
            letters().save_pretrained(path)


def write_rows(folder: Path, prompt: int, completion: int) -> None:
    """Rows of exactly so many tokens; some prompts one shorter, so that sampling pads."""
    lines: dict[str, list[dict[str, str]]] = {"sft": [], "pairs": []}
    for row in range(32):
        text = chr(ord("a") + row % 26) * (prompt - (row % 8 == 7))
        answers = {name: letter * (completion - 1) for name, letter in (("chosen", "y"), ("rejected", "n"))}
        mark = chr(ord("A") + row % 26)
        lines["pairs"].append({"prompt": text, **{k: mark + v[1:] for k, v in answers.items()}})
        lines["sft"].append({"prompt": text, "completion": answers["chosen"]})
    for name, rows in lines.items():
        path = folder / f"{prompt}-{completion}-{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def predicted(case: Case, folder: Path) -> float:
    """MiB that ``lightning-rlhf memory`` finds."""
    from lightning_rlhf.algorithms.footprint import forecast
    from lightning_rlhf.cli.memory import MemoryCLI
    from lightning_rlhf.cli.memory_config import training_of

    with contextlib.redirect_stdout(io.StringIO()):
        cli = MemoryCLI(case.arguments(folder / "policy", folder / "policy-reward"))
        return forecast(training_of(cli.plain, cli.sizes)).total / MIB


def measured(cases: Sequence[Case], folder: Path) -> list[float]:
    """MiB at the peak of a process that trains, one case after the other."""
    warm_up = cases[0].arguments(folder / "tiny", folder / "tiny-reward")
    runs = [case.arguments(folder / "policy", folder / "policy-reward") for case in cases]
    command = [sys.executable, "-m", "tests.benchmarks.memory_worker", *map(json.dumps, [warm_up, *runs])]
    environment = {**os.environ, **MALLOC, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    found = re.findall(r"^peak (\S+)$", done.stdout, re.MULTILINE)
    if len(found) < len(cases):
        raise RuntimeError(f"{cases[len(found)].name}: {done.stderr[-3000:]}")
    return [float(each) for each in found]


def compare(cases: Sequence[Case], folder: Path) -> list[tuple[float, float]]:
    """Predicted and measured MiB of trainings that one process runs."""
    for case in cases:
        write_rows(folder, case.prompt, case.completion)
    predictions = [predicted(case, folder) for case in cases]
    return list(zip(predictions, measured(cases, folder), strict=True))


def main() -> int:
    """Print a row a training, as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="trainings whose name holds one of these words"
    )
    options = parser.parse_args()
    wanted = [c for c in CASES if options.only is None or any(word in c.name for word in options.only)]
    print(
        "| training | rows × (prompt + completion) | predicted, MiB | measured, MiB | predicted / measured |"
    )
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for case in wanted:
            ((ours, theirs),) = compare([case], Path(folder))
            sizes = f"{case.rows} × ({case.prompt} + {case.completion:,})"
            print(
                f"| {case.name} | {sizes} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.3f} |", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
