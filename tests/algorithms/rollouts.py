"""Prompts, a reward and a sampler of known completions: what the tests of PPO share."""

import math
import random

import torch
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import PPO, Optimization, Update
from lightning_rlhf.data import PromptCollator
from lightning_rlhf.generation import Completion, Generator, Sampling
from lightning_rlhf.rewards import Reward
from tests.models.families import VOCABULARY

EOS = 2
SAMPLING = Sampling(max_new_tokens=5, num_samples=2)
SGD = Optimization(name="sgd", lr=1e-2, schedule="constant")


def prompts(count=4, batch_size=4, seed=0, **columns):
    """A loader of random prompts, as a PromptDataModule gives them."""
    draw = random.Random(seed)
    rows = [
        {
            "prompt_ids": [draw.randrange(3, 60) for _ in range(draw.randint(1, 6))],
            "text": f"prompt {row}",
            "messages": None,
            "columns": {name: values[row] for name, values in columns.items()},
            "row_id": row,
        }
        for row in range(count)
    ]
    return DataLoader(rows, batch_size=batch_size, collate_fn=PromptCollator())


class Waves(Reward):
    """A number between -1 and 1 that depends on every token of a completion, and on nothing else."""

    def forward(self, samples):
        return torch.tensor([wave(ids) for ids in samples.completion_ids])


def wave(ids):
    return sum(math.sin(1.7 * token) for token in ids) / len(ids)


class Written(Generator):
    """Random completions by the seeds, of 1 to 7 tokens, every third one cut off; remembered call by call."""

    def __init__(self):
        self.calls = []

    def generate(self, model, tokenizer, prompts, sampling, *, seeds=None):
        call = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            draw = random.Random(seed)
            group = []
            for _ in range(sampling.num_samples):
                tokens = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(0, 6))]
                cut = bool(tokens) and draw.random() < 0.33
                tokens = tokens if cut else [*tokens, EOS]
                group.append(Completion(list(prompt), tokens, f"{tokens}", cut))
            call.append(group)
        self.calls.append(call)
        yield from call


def ppo(policy, tokenizer=None, reward=None, **settings):
    """PPO that is quick: SGD, small samples, one epoch in one minibatch."""
    defaults = {
        "sampling": SAMPLING,
        "optimization": SGD,
        "update": Update(num_epochs=1, minibatch_size=64),
    }
    return PPO(policy, reward or Waves(), tokenizer, **{**defaults, **settings})
