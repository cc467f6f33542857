"""Sampling completions."""

from lightning_rlhf.generation.generators import Generator, HFGenerator
from lightning_rlhf.generation.sampling import Completion, Sampling, generate

__all__ = ["Completion", "Generator", "HFGenerator", "Sampling", "generate"]
