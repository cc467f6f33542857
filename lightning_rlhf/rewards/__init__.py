"""What scores a completion: reward models, functions, endpoints, their sums and shaping."""

from lightning_rlhf.rewards.base import Reward, RewardError, RewardResult, begin, score
from lightning_rlhf.rewards.combined import RewardEnsemble, WeightedReward
from lightning_rlhf.rewards.constrained import ConstrainedReward
from lightning_rlhf.rewards.endpoint import EndpointError, EndpointReward
from lightning_rlhf.rewards.functions import FunctionReward
from lightning_rlhf.rewards.samples import Samples
from lightning_rlhf.rewards.scorers import ImplicitReward, ModelReward, RewardModelReward
from lightning_rlhf.rewards.shaping import (
    Clip,
    LengthPenalty,
    MissingEOSPenalty,
    ShapedReward,
    Shaper,
    SoftOverlong,
)
from lightning_rlhf.rewards.statistics import LengthResidual, Normalized

__all__ = [
    "Clip",
    "ConstrainedReward",
    "EndpointError",
    "EndpointReward",
    "FunctionReward",
    "ImplicitReward",
    "LengthPenalty",
    "LengthResidual",
    "MissingEOSPenalty",
    "ModelReward",
    "Normalized",
    "Reward",
    "RewardEnsemble",
    "RewardError",
    "RewardModelReward",
    "RewardResult",
    "Samples",
    "ShapedReward",
    "Shaper",
    "SoftOverlong",
    "WeightedReward",
    "begin",
    "score",
]
