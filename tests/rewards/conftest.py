import pytest
import torch

from lightning_rlhf.rewards import Reward, Samples


def samples_of(count=3, **columns):
    """Samples of distinct prompts; completion i has i + 1 tokens, and the last one is cut off."""
    return Samples(
        prompts=[f"prompt {i}" for i in range(count)],
        completions=[f"answer {i}" for i in range(count)],
        prompt_ids=[[10 + i] for i in range(count)],
        completion_ids=[[20 + i] * (i + 1) for i in range(count)],
        truncated=[i == count - 1 for i in range(count)],
        columns=columns,
    )


class Fixed(Reward):
    """Returns what it was made with, whatever the samples."""

    def __init__(self, values, name=None):
        super().__init__(name)
        self.values = values

    def forward(self, samples):
        return torch.tensor(self.values) if isinstance(self.values, list) else self.values


@pytest.fixture
def samples():
    return samples_of()
