"""Sampling completions."""

from lightning_rlhf.generation.sampling import Completion, Sampling, generate

__all__ = ["Completion", "Sampling", "generate"]
