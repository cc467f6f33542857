"""Models: loading, LoRA and quantisation, shared-prefix attention, the reference, export."""

from lightning_rlhf.models.compilation import compile_layers
from lightning_rlhf.models.language_model import LanguageModel
from lightning_rlhf.models.loading import load_base, load_language_model, load_tokenizer
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.models.reward_directory import load_scorer
from lightning_rlhf.models.scorer import Aggregation, Ensemble, ScoreHead, Scorer
from lightning_rlhf.models.settings import LoRA, Policy, Quantization

__all__ = [
    "Aggregation",
    "Ensemble",
    "LanguageModel",
    "LoRA",
    "Policy",
    "Quantization",
    "Reference",
    "ScoreHead",
    "Scorer",
    "compile_layers",
    "load_base",
    "load_language_model",
    "load_scorer",
    "load_tokenizer",
]
