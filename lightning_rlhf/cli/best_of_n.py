"""lightning-rlhf best-of-n: the best of several samples by a reward, and what it is worth by another."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_rlhf import functional as RF
from lightning_rlhf.callbacks.goodhart import finite
from lightning_rlhf.cli.generate import write_rows
from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.cli.scored import as_answer, scored_samples, with_samples
from lightning_rlhf.generation import Sampling
from lightning_rlhf.metrics.goodhart import GoodhartCurve, fit_of
from lightning_rlhf.metrics.goodhart_plot import draw
from lightning_rlhf.models.export import refuse_existing, written_whole
from lightning_rlhf.rewards import Reward, Samples


def best_of_n(
    policy: str,
    prompts: str,
    proxy: Reward | str,
    gold: Reward | str | None = None,
    output: Path | None = None,
    report: Path | None = None,
    n: int = 16,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Sample n completions a prompt, keep the best by a proxy reward, and say what the best of 1 … n is worth.

    Args:
        policy: A Hub id, a model or adapter directory, or a checkpoint of a training.
        prompts: What PromptDataModule reads: a file with a column "prompt", a directory or a Hub id; reward functions
            are given the other columns.
        proxy: What the best is chosen by: the directory or Hub id of a reward model, or a reward by its class, such as
            FunctionReward.
        gold: What the proxy stands for, likewise; with it, over-optimisation shows.
        output: A JSON lines file to write, data for SFT: prompt, completion, score, truncated. Else none is.
        report: A folder to write: the table as table.json, proxy and gold over the distance as best_of_n.png.
        n: Samples a prompt.
        sampling: How completions are drawn; num_samples is n.
        seed: Of the samples, by row.
        device: cpu, cuda, …; auto takes a GPU where there is one.
        trust_remote_code: Run code that comes with the model.
        overwrite: Replace output and report where they exist.
    """
    drawn = with_samples(sampling, n, least=1)
    for path in (output, report):
        if path is not None:
            refuse_existing(path, overwrite=overwrite)
    rewards = [proxy] if gold is None else [proxy, gold]
    found: list[Tensor] = []

    def rows() -> Iterator[dict[str, Any]]:
        sampled = scored_samples(
            policy, prompts, rewards, drawn, seed=seed, device=device, trust_remote_code=trust_remote_code
        )
        for samples, scores in sampled:
            found.append(scores)
            best = scores[0].argmax(1) + torch.arange(scores.shape[1]) * n
            yield from sft_rows(samples, best.tolist(), scores[0].amax(1).tolist())

    if output is None:
        count = sum(1 for _ in rows())
        print(f"sampled {n} completions for each of {count} prompts")
    else:
        count = write_rows(rows(), output)
        print(f"wrote the best of {n} completions for {count} prompts to {output}")
    scores = torch.cat(found, dim=1)
    curve = RF.best_of_n_curve(scores[0], scores[-1])
    Console().print(worth_table(curve, with_gold=gold is not None))
    if report is not None:
        with written_whole(report, overwrite=overwrite) as folder:
            write_report(folder, curve, scores, with_gold=gold is not None)


def sft_rows(samples: Samples, best: list[int], scores: list[float]) -> Iterator[dict[str, Any]]:
    """Rows of prompt–completion data, of those samples that are the best of their prompt.

    Example:
        >>> samples = Samples(["Hi", "Hi"], ["Yo", "Ho"], [[5], [5]], [[6], [7]], [False, True])
        >>> list(sft_rows(samples, [1], [0.5]))
        [{'prompt': 'Hi', 'completion': 'Ho', 'score': 0.5, 'truncated': True}]
    """
    for place, value in zip(best, scores, strict=True):
        prompt = samples.prompts[place]
        yield {
            "prompt": prompt,
            "completion": as_answer(prompt, samples.completions[place]),
            "score": value,
            "truncated": samples.truncated[place],
        }


def worth_table(curve: RF.BestOfNCurve, *, with_gold: bool) -> Table:
    """What the best of n is worth, for a terminal."""
    names = ("n", "mean reward", "standard error", "KL at most (nats)")
    golden = ("mean gold", "its standard error") if with_gold else ()
    table = Table(*names, *golden, title="the best of n")
    for n, kl, proxy, gold, proxy_error, gold_error in zip(
        *(column.tolist() for column in curve), strict=True
    ):
        cells = [f"{n:.0f}", f"{proxy:.4f}", f"{proxy_error:.4f}", f"{kl:.3f}"]
        table.add_row(*cells, *([f"{gold:.4f}", f"{gold_error:.4f}"] if with_gold else []))
    return table


def write_report(folder: Path, curve: RF.BestOfNCurve, scores: Tensor, *, with_gold: bool) -> None:
    """Write ``table.json`` and, where there is a gold reward, ``best_of_n.png``: both standardised on single samples.

    Args:
        folder: Exists.
        curve: What to write.
        scores: Proxy and gold of all samples, ``(2, P, N)``.
        with_gold: Whether the second is a gold reward.
    """
    content = {name: [finite(value) for value in column.tolist()] for name, column in curve._asdict().items()}
    if not with_gold:
        content = {name: values for name, values in content.items() if not name.startswith("gold")}
    (folder / "table.json").write_text(json.dumps(content, indent=1) + "\n")
    if with_gold:
        standard = standardised(curve, scores)
        figure, _ = draw(standard, fit_of(standard, "best_of_n"))
        assert figure is not None
        figure.savefig(folder / "best_of_n.png", dpi=120)


def standardised(curve: RF.BestOfNCurve, scores: Tensor) -> GoodhartCurve:
    """The curve in standard deviations of single samples, ``(2, P, N)``: those of the starting policy.

    Raises:
        ValueError: If one of the rewards is the same for all samples.
    """
    samples = scores.double().flatten(1)
    (proxy, gold), (proxy_std, gold_std) = samples.mean(1), samples.std(1)
    for name, std in (("proxy", proxy_std), ("gold", gold_std)):
        if not std > 0:
            raise ValueError(
                f"{name} is the same for all samples: there is nothing to choose between, or to draw"
            )
    return GoodhartCurve(
        curve.n,
        curve.kl,
        (curve.proxy - proxy) / proxy_std,
        (curve.gold - gold) / gold_std,
        curve.proxy_error / proxy_std,
        curve.gold_error / gold_std,
    )


def main(arguments: list[str]) -> None:
    """Run :func:`best_of_n` with arguments of the command line."""
    run_function(best_of_n, arguments)
