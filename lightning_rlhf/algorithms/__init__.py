"""LightningModules, one an algorithm."""

from lightning_rlhf.algorithms.dpo import DPO
from lightning_rlhf.algorithms.kto import KTO
from lightning_rlhf.algorithms.optimization import Optimization
from lightning_rlhf.algorithms.reward_model import RewardModel
from lightning_rlhf.algorithms.sft import SFT

__all__ = [
    "DPO",
    "KTO",
    "SFT",
    "Optimization",
    "RewardModel",
]
