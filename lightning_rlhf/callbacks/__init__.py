"""What watches training; added by the Trainer's user, the command line and recipes."""

from lightning_rlhf.callbacks.exact_resume import ExactResume
from lightning_rlhf.callbacks.goodhart import GoodhartMonitor
from lightning_rlhf.callbacks.hacking import HackingMonitor
from lightning_rlhf.callbacks.held_out_kl import HeldOutKL
from lightning_rlhf.callbacks.sample_table import SampleTable

__all__ = ["ExactResume", "GoodhartMonitor", "HackingMonitor", "HeldOutKL", "SampleTable"]
