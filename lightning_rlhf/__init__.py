"""RLHF for PyTorch Lightning: every algorithm a LightningModule, every prompt computed once.

Names are imported when they are first used, so that ``import lightning_rlhf`` stays quick.
"""

import importlib
from typing import Any

_HOMES = {
    "SFT": "lightning_rlhf.algorithms",
    "DPO": "lightning_rlhf.algorithms",
    "KTO": "lightning_rlhf.algorithms",
    "Optimization": "lightning_rlhf.algorithms",
    "OnlineDPO": "lightning_rlhf.algorithms",
    "PPO": "lightning_rlhf.algorithms",
    "RewardModel": "lightning_rlhf.algorithms",
    "SFTDataModule": "lightning_rlhf.data",
    "PreferenceDataModule": "lightning_rlhf.data",
    "UnpairedDataModule": "lightning_rlhf.data",
    "PromptDataModule": "lightning_rlhf.data",
    "Policy": "lightning_rlhf.models",
    "LoRA": "lightning_rlhf.models",
    "Quantization": "lightning_rlhf.models",
    "Sampling": "lightning_rlhf.generation",
}
_MODULES = ("callbacks", "functional", "metrics", "objectives", "rewards", "sandbox")

__version__ = "0.1.0"
__all__ = [
    "DPO",
    "KTO",
    "SFT",
    "LoRA",
    "OnlineDPO",
    "Optimization",
    "PPO",
    "Policy",
    "PreferenceDataModule",
    "PromptDataModule",
    "Quantization",
    "RewardModel",
    "SFTDataModule",
    "Sampling",
    "UnpairedDataModule",
    "callbacks",
    "functional",
    "metrics",
    "objectives",
    "rewards",
    "sandbox",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name
    """Import a public name where it lives."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"lightning_rlhf.{name}")
    raise AttributeError(f"module 'lightning_rlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
