"""What a training will take in memory, found before anything is loaded."""

from lightning_rlhf.algorithms.footprint.phases import forecast
from lightning_rlhf.algorithms.footprint.settings import Forecast, Phase, RewardRole, Training

__all__ = ["Forecast", "Phase", "RewardRole", "Training", "forecast"]
