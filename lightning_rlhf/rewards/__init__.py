"""What scores a completion: reward models, functions, endpoints, their sums and shaping."""

from lightning_rlhf.rewards.base import Reward, RewardError, RewardResult, Samples, begin, score

__all__ = ["Reward", "RewardError", "RewardResult", "Samples", "begin", "score"]
