"""Sampling completions."""

from lightning_rlhf.generation.generators import Generator, HFGenerator
from lightning_rlhf.generation.sampling import Completion, Sampling, generate
from lightning_rlhf.generation.vllm_engine import VLLMGenerator
from lightning_rlhf.generation.vllm_server import VLLMServerGenerator

__all__ = [
    "Completion",
    "Generator",
    "HFGenerator",
    "Sampling",
    "VLLMGenerator",
    "VLLMServerGenerator",
    "generate",
]
