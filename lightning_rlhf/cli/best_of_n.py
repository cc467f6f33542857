"""lightning-rlhf best-of-n: the best of several samples by a reward, as data for SFT."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms.rollout import prompt_seeds, sample_rollout
from lightning_rlhf.cli.generate import load, write_rows
from lightning_rlhf.cli.measure import standard_error
from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.data import PromptDataModule
from lightning_rlhf.generation import HFGenerator, Sampling
from lightning_rlhf.models.export import refuse_existing
from lightning_rlhf.rewards import Reward, RewardModelReward, Samples, score


def best_of_n(
    model: str,
    prompts: str,
    output: Path,
    reward_model: str | None = None,
    reward: Reward | None = None,
    n: int = 16,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Sample n completions a prompt and keep the best by a reward: rejection sampling, as data for SFT.

    Args:
        model: A Hub id, a model or adapter directory, or a checkpoint of a training.
        prompts: What PromptDataModule reads: a file with a column "prompt", a directory or a Hub id; reward functions
            are given the other columns.
        output: A JSON lines file to write: prompt, completion, score, truncated.
        reward_model: The directory or Hub id of a reward model.
        reward: Any other reward by its class, such as FunctionReward; instead of reward_model.
        n: Samples a prompt.
        sampling: How completions are drawn; num_samples is n.
        seed: Of the samples, by row.
        device: cpu, cuda, …; auto takes a GPU where there is one.
        trust_remote_code: Run code that comes with the model.
        overwrite: Replace the output where it exists.
    """
    if (reward_model is None) == (reward is None):
        raise ValueError("give either --reward_model DIRECTORY or --reward CLASS")
    if n < 1 or sampling.num_samples not in (1, n):
        raise ValueError(f"n must be at least 1, and stands for sampling.num_samples; got n = {n}")
    refuse_existing(output, overwrite=overwrite)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    policy, tokenizer = load(model, trust_remote_code=trust_remote_code)
    judge = reward if reward is not None else RewardModelReward(str(reward_model))
    judge.attach(policy.to(place), tokenizer)
    judge.to(place)
    data = PromptDataModule(
        predict=prompts, tokenizer=tokenizer, batch_size=sampling.batch_size, max_length=None
    )
    data.setup("predict")
    scores: list[Tensor] = []

    def rows() -> Iterator[dict[str, Any]]:
        for batch in track(data.predict_dataloader(), "sampling"):
            seeds = prompt_seeds(seed, 0, batch.row_ids)
            drawn = replace(sampling, num_samples=n)
            samples = sample_rollout(batch, HFGenerator(), policy, tokenizer, drawn, seeds).samples
            scores.append(score(judge, samples).total.view(len(batch), n))
            best = scores[-1].argmax(1) + torch.arange(len(batch)) * n
            yield from sft_rows(samples, best.tolist(), scores[-1].amax(1).tolist())

    count = write_rows(rows(), output)
    print(f"wrote the best of {n} completions for {count} prompts to {output}")
    Console().print(worth_table(torch.cat(scores)))


def sft_rows(samples: Samples, best: list[int], scores: list[float]) -> Iterator[dict[str, Any]]:
    """Rows of prompt–completion data, of those samples that are the best of their prompt.

    Example:
        >>> samples = Samples(["Hi", "Hi"], ["Yo", "Ho"], [[5], [5]], [[6], [7]], [False, True])
        >>> list(sft_rows(samples, [1], [0.5]))
        [{'prompt': 'Hi', 'completion': 'Ho', 'score': 0.5, 'truncated': True}]
    """
    for place, value in zip(best, scores, strict=True):
        prompt, text = samples.prompts[place], samples.completions[place]
        answer = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        yield {
            "prompt": prompt,
            "completion": answer,
            "score": value,
            "truncated": samples.truncated[place],
        }


def worth(scores: Tensor) -> list[tuple[int, float, float, float]]:
    """What the best of n is worth, for n = 1, 2, 4 … N, without bias.

    Args:
        scores: ``(P, N)``, N samples of each of P prompts.

    Returns:
        n, the mean reward over prompts, its standard error (nan for one prompt), and the bound of the KL in nats.

    Example:
        >>> [(n, round(mean, 4)) for n, mean, _, _ in worth(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]))]
        [(1, 1.5), (2, 2.3333), (3, 3.0)]
    """
    total = scores.shape[1]
    sizes = [2**i for i in range(total.bit_length()) if 2**i < total] + [total]
    found = []
    for n in sizes:
        values = RF.best_of_n_expectation(scores, scores, n)
        error = standard_error(values.tolist()) if len(values) > 1 else float("nan")
        found.append((n, values.mean().item(), error, RF.best_of_n_kl(n)))
    return found


def worth_table(scores: Tensor) -> Table:
    """:func:`worth` for a terminal."""
    table = Table("n", "mean reward", "standard error", "KL at most (nats)", title="the best of n")
    for n, mean, error, kl in worth(scores):
        table.add_row(str(n), f"{mean:.4f}", f"{error:.4f}", f"{kl:.3f}")
    return table


def main(arguments: list[str]) -> None:
    """Run :func:`best_of_n` with arguments of the command line."""
    run_function(best_of_n, arguments)
