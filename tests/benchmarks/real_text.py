"""A small ensemble of reward models on real pairs: ``python -m tests.benchmarks.real_text FOLDER_OF_ASSETS``.

How much of its reward is length, how often the longer answer wins, and whether its members disagree more on stories, a
kind of text that they never compared. The base is the one of 260,000 weights that was trained on such stories.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch

from lightning_rlhf.algorithms import Optimization, RewardModel
from lightning_rlhf.data import PreferenceDataModule, load_rows
from lightning_rlhf.data.packing import PromptGroup, pack

MAX_PROMPT, MAX_COMPLETION, HELD_OUT = 128, 128, 300


@torch.no_grad()
def disagreement(module: RewardModel, prompts: Sequence[str], answers: Sequence[str]) -> str:
    """Mean and standard error of the standard deviation over the members' normalised scores."""
    tokenizer, ensemble = module.tokenizer, module.ensemble.eval()
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(answer, add_special_tokens=False).input_ids[: MAX_COMPLETION - 1]
        group = PromptGroup(
            tokenizer(prompt).input_ids[-MAX_PROMPT:], [[*ids, int(tokenizer.eos_token_id or 0)]]
        )
        found.append(ensemble.normalized(ensemble.raw(pack([group]))).std(0, correction=0))
    values = torch.cat(found)
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def main() -> None:
    """Train, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real_text", description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--pairs", type=int, default=600)
    options = parser.parse_args()
    rows = load_rows(str(options.assets / "preferences/hh_helpful_train.jsonl.gz"))
    held_out = rows.select(range(options.pairs, options.pairs + HELD_OUT))
    data = PreferenceDataModule(
        rows.select(range(options.pairs)),
        val=held_out,
        batch_size=16,
        max_length=MAX_PROMPT + MAX_COMPLETION,
        max_prompt_length=MAX_PROMPT,
        on_bad_row="drop",
    )
    L.seed_everything(0, verbose=False)
    module = RewardModel(
        str(options.assets / "stories260K-hf"),
        num_members=3,
        member_share=0.7,
        optimization=Optimization(lr=1e-3, warmup_ratio=0.1),
    )
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=1.0
    )
    trainer.fit(module, datamodule=data)
    for name in ("accuracy", "longer_wins", "length_correlation"):
        print(f"{name}: {trainer.callback_metrics[f'val/{name}'].item():.3f}")
    print("disagreement, held-out answers:", disagreement(module, held_out["prompt"], held_out["chosen"]))
    stories = load_rows(str(options.assets / "text/tinystories_test.jsonl.gz"))["text"][:HELD_OUT]
    halves = [(text[: len(text) // 3], text[len(text) // 3 :]) for text in stories]
    print("disagreement, stories:", disagreement(module, *zip(*halves, strict=True)))


if __name__ == "__main__":
    main()
