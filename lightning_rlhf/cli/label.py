"""lightning-rlhf label: samples of a policy, ranked, as data for a reward model."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_rlhf.cli.generate import write_rows
from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.cli.scored import as_answer, scored_samples, with_samples
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models.export import refuse_existing
from lightning_rlhf.rewards import Reward, Samples


def label(
    policy: str,
    prompts: str,
    output: Path,
    judge: Reward | str | None = None,
    n: int = 4,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    keep: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Sample n completions a prompt and rank them, as data for a reward model: a round of re-labelling.

    Args:
        policy: A Hub id, a model or adapter directory, or a checkpoint of a training.
        prompts: What PromptDataModule reads: a file with a column "prompt", a directory or a Hub id; judges that are
            functions are given the other columns.
        output: A JSON lines file to write: prompt, completions, ranks (lower is better).
        judge: A reward by its class, or the directory or Hub id of a reward model. Without one the ranks are null, for
            people to fill in.
        n: Samples a prompt.
        sampling: How completions are drawn; num_samples is n.
        keep: A JSON lines file whose rows come first: the labels of earlier rounds.
        seed: Of the samples, by row.
        device: cpu, cuda, …; auto takes a GPU where there is one.
        trust_remote_code: Run code that comes with the model.
        overwrite: Replace the output where it exists.
    """
    drawn = with_samples(sampling, n, least=2)
    refuse_existing(output, overwrite=overwrite)
    kept = [] if keep is None else kept_rows(keep)
    judges = [] if judge is None else [judge]
    same = empty = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal same, empty
        sampled = scored_samples(
            policy, prompts, judges, drawn, seed=seed, device=device, trust_remote_code=trust_remote_code
        )
        for samples, scores in sampled:
            empty += sum(not text.strip() for text in samples.completions)
            for row in ranked_rows(samples, scores[0] if judges else None, n):
                if row is None:
                    same += 1
                else:
                    yield row

    count = write_rows(chain(kept, rows()), output) - len(kept)
    print(
        f"wrote {count} prompts with at most {n} completions to {output}, after {len(kept)} rows that were kept"
    )
    if same:
        print(f"{same} prompts are left out: all their samples were the same, or the same to the judge")
    if empty:
        print(f"{empty} samples are left out: they were empty, and a ranking has no place for nothing")
    if judge is None:
        print('fill in "ranks", a number for each completion, lower is better, equal for a tie')


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of rankings or of pairs, all as rankings.

    Raises:
        ValueError: If a row is neither, or has a margin, which a ranking has no place for.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        row = json.loads(line)
        if {"prompt", "chosen", "rejected"} <= row.keys() and "margin" not in row:
            row = {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]}
        if not {"prompt", "completions"} <= row.keys():
            raise ValueError(
                f"{path}, row {number}: columns {', '.join(row)}; to be kept, a row has prompt and completions, or "
                "prompt, chosen and rejected without a margin"
            )
        ranks = row.get("ranks") or list(range(1, len(row["completions"]) + 1))
        rows.append({"prompt": row["prompt"], "completions": row["completions"], "ranks": ranks})
    return rows


def ranked_rows(samples: Samples, scores: Tensor | None, n: int) -> Iterator[dict[str, Any] | None]:
    """Rows of ranked data, each different completion that says something once; None where there is nothing to compare.

    Args:
        samples: n of each prompt, one after the other.
        scores: The judge's, ``(P, n)``; None leaves the ranks to people.
        n: Samples a prompt.

    Example:
        >>> import torch
        >>> samples = Samples(["Hi"] * 3, ["Yo", "Ho", "Yo"], [[5]] * 3, [[6], [7], [6]], [False] * 3)
        >>> next(ranked_rows(samples, torch.tensor([[0.1, 0.7, 0.1]]), 3))
        {'prompt': 'Hi', 'completions': ['Yo', 'Ho'], 'ranks': [2, 1]}
    """
    for place in range(len(samples) // n):
        prompt, texts = samples.prompts[place * n], samples.completions[place * n : (place + 1) * n]
        first = [k for k, text in enumerate(texts) if text.strip() and text not in texts[:k]]
        ranks = None if scores is None else ranks_of([scores[place, k].item() for k in first])
        if len(first) < 2 or (ranks and max(ranks) == 1):
            yield None
            continue
        yield {
            "prompt": prompt,
            "completions": [as_answer(prompt, texts[k]) for k in first],
            "ranks": ranks,
        }


def ranks_of(scores: Sequence[float]) -> list[int]:
    """1 for the highest; equal scores have one rank.

    Example:
        >>> ranks_of([0.5, 2.0, 0.5, -1.0])
        [2, 1, 2, 3]
    """
    order = sorted(set(scores), reverse=True)
    return [order.index(score) + 1 for score in scores]


def main(arguments: list[str]) -> None:
    """Run :func:`label` with arguments of the command line."""
    run_function(label, arguments)
