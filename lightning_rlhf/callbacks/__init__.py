"""What watches training; added by the Trainer's user, the command line and recipes."""

from lightning_rlhf.callbacks.exact_resume import ExactResume
from lightning_rlhf.callbacks.held_out_kl import HeldOutKL

__all__ = ["ExactResume", "HeldOutKL"]
