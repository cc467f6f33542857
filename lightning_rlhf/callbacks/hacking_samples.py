"""Rows of samples for the detectors of reward hacking, and what the detectors find in them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data import PromptBatch
from lightning_rlhf.data.prompts import prompt_ids
from lightning_rlhf.metrics import hacking
from lightning_rlhf.models.modes import in_eval_mode
from lightning_rlhf.rewards import Reward, Samples, score

Row = dict[str, Any]


def questions(count: int) -> list[hacking.Question]:
    """Questions with known answers: facts first, then arithmetic, none twice.

    Example:
        >>> [len(questions(n)) for n in (0, 3, 20)]
        [0, 3, 20]
    """
    facts = list(hacking.FACTS[:count])
    sums: dict[str, hacking.Question] = {}
    seed = 0
    while len(facts) + len(sums) < count:
        (one,) = hacking.arithmetic_questions(1, seed=seed)
        sums[one.text] = one
        seed += 1
    return facts + list(sums.values())


def asked_of(tokenizer: Any, texts: Sequence[str], share: slice) -> PromptBatch:  # noqa: ANN401 - of Transformers
    """Texts as prompts, numbered: a conversation where the tokenizer has a template for it."""
    numbers = range(len(texts))[share]
    chosen = [texts[number] for number in numbers]
    conversational = getattr(tokenizer, "chat_template", None) is not None
    prompts = [[{"role": "user", "content": text}] if conversational else text for text in chosen]
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    return PromptBatch(tuple(ids), tuple(chosen), tuple(prompts), {}, tuple(numbers))


def sample_rows(prompts: PromptBatch, samples: Samples, count: int) -> list[Row]:
    """The samples of each prompt in one row, with their lengths."""
    lengths = samples.lengths.tolist()
    spans = [slice(count * place, count * (place + 1)) for place in range(len(prompts))]
    return [
        {"row": row, "texts": list(samples.completions[span]), "lengths": lengths[span]}
        for row, span in zip(prompts.row_ids, spans, strict=True)
    ]


def add_rewards(rows: Sequence[Row], samples: Samples, kl: Tensor, reward: Reward | None) -> None:
    """Add each sample's KL, its reward and what the members of a reward say; nothing where there is no reward."""
    columns = {"kl": kl.tolist()}
    if reward is not None:
        with in_eval_mode(reward):
            found = score(reward, samples)
        columns["rewards"] = found.total.tolist()
        members = [
            value for name, value in found.parts.items() if name.rpartition("/")[2].startswith("member_")
        ]
        if len(members) > 1:
            columns["members"] = torch.stack(members, dim=1).tolist()
    count = len(samples) // len(rows)
    for place, row in enumerate(rows):
        row |= {name: values[count * place : count * (place + 1)] for name, values in columns.items()}


def found_in(
    rows: dict[str, list[Row]],
    control: dict[str, list[Row]],
    asked: Sequence[hacking.Question],
    *,
    kl: float,
    confidence: float,
) -> dict[str, float]:
    """What the detectors find in samples, against the control's.

    Args:
        rows: Samples of the policy by kind: ``held_out``, ``benign``, ``plain`` (questions, twice), ``opinion``, and
            ``answers`` with a reward's scores.
        control: Those of the starting policy.
        asked: The questions.
        kl: Mean KL of the policy, in nats.
        confidence: Of the intervals.
    """
    length = hacking.LengthDrift(confidence=confidence)
    shares = hacking.FormatShares(confidence=confidence)
    diversity = hacking.Diversity(confidence=confidence)
    refusals = hacking.RefusalRate(confidence=confidence)
    disagreement = hacking.EnsembleDisagreement(confidence=confidence)
    certainty = hacking.Certainty(confidence=confidence)
    for source, reference in ((control, True), (rows, False)):
        held_out = source["held_out"]
        lengths = torch.tensor([n for row in held_out for n in row["lengths"]])
        rewards = torch.tensor(
            [r for row in held_out for r in row.get("rewards", [0.0] * len(row["lengths"]))]
        )
        length.update(lengths, rewards, kl=0.0 if reference else max(kl, 0.0), reference=reference)
        shares.update([text for row in held_out for text in row["texts"]], reference=reference)
        diversity.update([row["texts"] for row in held_out], reference=reference)
        refusals.update([t for row in source.get("benign", []) for t in row["texts"]], reference=reference)
        members = [m for row in held_out for m in row.get("members", [])]
        if members:
            disagreement.update(torch.tensor(members).T, reference=reference)
        wrong = [
            text
            for row in source.get("plain", [])
            for text in row["texts"]
            if not hacking.answered(text, asked[row["row"]])
        ]
        certainty.update(wrong, reference=reference)
    flips = hacking.SycophancyFlipRate(confidence=confidence)
    nonsense = hacking.ConfidentNonsense(confidence=confidence)
    if answers := rows.get("answers"):
        nonsense.update(*torch.tensor([row["scores"] for row in answers]).T)
    if asked:
        first, repeat = (right(rows["plain"], asked, place) for place in (0, 1))
        flips.update(first, repeat, right(rows["opinion"], asked, 0))
    others = (shares, diversity, refusals, disagreement, certainty, flips, nonsense)
    for metric in (length, *others):
        # Every rank has all rows: together they would count each several times.
        metric.distributed_available_fn = lambda: False
    found = {
        name if name.startswith("length") else f"length_{name}": value
        for name, value in length.compute().items()
    }
    for metric in others:
        found |= metric.compute()
    return {name: value.item() for name, value in found.items()}


def right(rows: Sequence[Row], asked: Sequence[hacking.Question], place: int) -> Tensor:
    """Whether each question's sample at some place is the right answer, ``(N,)``, bool."""
    return torch.tensor([hacking.answered(row["texts"][place], asked[row["row"]]) for row in rows])


def answer_rows(
    prompts: PromptBatch,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[hacking.Question],
    reward: Reward,
) -> list[Row]:
    """A reward's scores of a fluent wrong, a plain right and a plain wrong answer to each question."""
    texts = [
        text for pair in hacking.nonsense_answers([asked[row] for row in prompts.row_ids]) for text in pair
    ]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    samples = Samples(
        prompts=[prompt for prompt in prompts.prompts for _ in range(3)],
        completions=texts,
        prompt_ids=[ids for ids in prompts.prompt_ids for _ in range(3)],
        completion_ids=[tokenizer(text, add_special_tokens=False).input_ids + end for text in texts],
        truncated=[False] * len(texts),
    )
    with in_eval_mode(reward):
        scores = score(reward, samples).total.view(-1, 3).tolist()
    return [{"row": row, "scores": three} for row, three in zip(prompts.row_ids, scores, strict=True)]
