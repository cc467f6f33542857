"""Samples of a policy with what rewards say of them, for commands that sample and score."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from lightning_rlhf.algorithms.rollout import prompt_seeds, sample_rollout
from lightning_rlhf.cli.generate import load
from lightning_rlhf.data import PromptDataModule
from lightning_rlhf.data.prompts import Text
from lightning_rlhf.generation import HFGenerator, Sampling
from lightning_rlhf.rewards import Reward, RewardModelReward, Samples, score


def scored_samples(
    policy: str,
    prompts: str,
    rewards: Sequence[Reward | str],
    sampling: Sampling,
    *,
    seed: int,
    device: str,
    trust_remote_code: bool,
) -> Iterator[tuple[Samples, Tensor]]:
    """Sample completions of prompts, and score them.

    Args:
        policy: A Hub id, a model or adapter directory, or a checkpoint of a training.
        prompts: What PromptDataModule reads.
        rewards: Each a reward, or the directory or Hub id of a reward model.
        sampling: How completions are drawn.
        seed: Of the samples, by row.
        device: cpu, cuda, …; auto takes a GPU where there is one.
        trust_remote_code: Run code that comes with the model.

    Yields:
        The samples of some prompts, those of a prompt one after the other, and their scores, ``(rewards, P, n)``.
    """
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model, tokenizer = load(policy, trust_remote_code=trust_remote_code)
    model.to(place)
    judges = [RewardModelReward(one) if isinstance(one, str) else one for one in rewards]
    for judge in judges:
        judge.attach(model, tokenizer)
        judge.to(place)
        judge.eval()
    data = PromptDataModule(
        predict=prompts, tokenizer=tokenizer, batch_size=sampling.batch_size, max_length=None
    )
    data.setup("predict")
    for batch in track(data.predict_dataloader(), "sampling"):
        seeds = prompt_seeds(seed, 0, batch.row_ids)
        samples = sample_rollout(batch, HFGenerator(), model, tokenizer, sampling, seeds).samples
        shape = (len(batch), sampling.num_samples)
        scores = [score(judge, samples).total.view(shape) for judge in judges]
        yield samples, torch.stack(scores) if scores else torch.empty(0, *shape)


def with_samples(sampling: Sampling, n: int, least: int) -> Sampling:
    """The same with n samples a prompt.

    Raises:
        ValueError: If n is less than ``least``, or ``sampling`` says another number.
    """
    if n < least or sampling.num_samples not in (1, n):
        raise ValueError(f"n must be at least {least}, and stands for sampling.num_samples; got n = {n}")
    return replace(sampling, num_samples=n)


def as_answer(prompt: Text, completion: str) -> Text:
    """A completion as data has it beside a prompt: text, or the assistant's message after a conversation.

    Example:
        >>> as_answer("Hi", "Yo"), as_answer([{"role": "user", "content": "Hi"}], "Yo")
        ('Yo', [{'role': 'assistant', 'content': 'Yo'}])
    """
    answer: list[dict[str, Any]] = [{"role": "assistant", "content": completion}]
    return completion if isinstance(prompt, str) else answer
