"""LightningModules, one an algorithm."""

from lightning_rlhf.algorithms.dpo import DPO
from lightning_rlhf.algorithms.estimators import GAE, GRPO, RLOO, Estimator, Reinforce
from lightning_rlhf.algorithms.kl_controller import KLControl
from lightning_rlhf.algorithms.kto import KTO
from lightning_rlhf.algorithms.odin import ODIN
from lightning_rlhf.algorithms.online_dpo import OnlineDPO
from lightning_rlhf.algorithms.optimization import Optimization
from lightning_rlhf.algorithms.ppo import PPO
from lightning_rlhf.algorithms.reward_model import RewardModel
from lightning_rlhf.algorithms.sft import SFT
from lightning_rlhf.algorithms.token_heads import TokenHead
from lightning_rlhf.algorithms.update import Update

__all__ = [
    "DPO",
    "GAE",
    "GRPO",
    "KTO",
    "ODIN",
    "PPO",
    "RLOO",
    "SFT",
    "Estimator",
    "KLControl",
    "OnlineDPO",
    "Optimization",
    "Reinforce",
    "RewardModel",
    "TokenHead",
    "Update",
]
