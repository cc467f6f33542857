"""What watches training; added by the Trainer's user, the command line and recipes."""

from lightning_rlhf.callbacks.exact_resume import ExactResume

__all__ = ["ExactResume"]
