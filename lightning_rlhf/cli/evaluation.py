"""Samples of the quickstart's models on held-out prompts, scored by gold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from rich.progress import track

from lightning_rlhf.cli.generate import prompt_ids
from lightning_rlhf.generation import Completion, Sampling, generate
from lightning_rlhf.models import LanguageModel, Policy, load_language_model, load_tokenizer
from lightning_rlhf.sandbox.gold import GoldReport
from lightning_rlhf.sandbox.world import World


@dataclass(frozen=True)
class Samples:
    """One completion for every prompt, and its score.

    Attributes:
        model: What they were sampled from.
        completions: In the order of the prompts.
        reports: What the gold reward found in each.
    """

    model: LanguageModel
    completions: list[Completion]
    reports: list[GoldReport]

    @property
    def gold(self) -> list[float]:
        """The gold rewards."""
        return [report.score for report in self.reports]

    @property
    def malformed(self) -> float:
        """Share of malformed completions."""
        return sum(report.malformed for report in self.reports) / len(self.reports)

    @property
    def truncated(self) -> float:
        """Share of completions that were cut off."""
        return sum(one.truncated for one in self.completions) / len(self.completions)

    @property
    def mean_length(self) -> float:
        """Tokens a completion, its end token included."""
        return sum(len(one.tokens) for one in self.completions) / len(self.completions)


def sample_and_score(
    folder: Path,
    prompts: Sequence[str],
    world: World,
    *,
    sampling: Sampling,
    seed: int,
    title: str,
) -> Samples:
    """Sample from an exported model and score the completions.

    Args:
        folder: Of the model and its tokenizer.
        prompts: Held-out.
        world: Scores the completions.
        sampling: One completion a prompt.
        seed: The same for every model.
        title: Shown beside the progress bar.

    Returns:
        The samples.
    """
    model = load_language_model(Policy(str(folder))).eval().requires_grad_(False)
    tokenizer = load_tokenizer(str(folder))
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    L.seed_everything(seed, verbose=False)
    with torch.random.fork_rng(devices=[]):
        drawn = generate(model, tokenizer, ids, sampling)
        completions = [several[0] for several in track(drawn, title, total=len(ids))]
    reports = [
        world.report(prompt, one.text, truncated=one.truncated)
        for prompt, one in zip(prompts, completions, strict=True)
    ]
    return Samples(model, completions, reports)
