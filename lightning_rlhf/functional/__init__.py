"""Tensors in, tensors out: the mathematics of RLHF, importing torch only.

Losses return one value per pair, sequence or token; whoever calls them reduces. Statistics and fits, which do
reduce, say so by their names.
"""

from lightning_rlhf.functional.annotators import agreement, cohen_kappa
from lightning_rlhf.functional.calibration import ReliabilityCurve, calibration_error, reliability_curve
from lightning_rlhf.functional.intervals import wilson_interval
from lightning_rlhf.functional.kl import kl_k1, kl_k2, kl_k3
from lightning_rlhf.functional.kto import apo_zero_unpaired_loss, kto_loss, kto_reference_point
from lightning_rlhf.functional.language_modeling import perplexity, sft_loss
from lightning_rlhf.functional.length import length_correlation, longer_wins_accuracy, soft_overlong_penalty
from lightning_rlhf.functional.logprobs import TokenLogprobs, sum_by_sequence, token_logprobs
from lightning_rlhf.functional.masking import masked_mean, masked_var, masked_whiten
from lightning_rlhf.functional.moments import mean_and_std
from lightning_rlhf.functional.preference import dpo_loss, implicit_rewards, pairwise_accuracy
from lightning_rlhf.functional.ranking import (
    Comparisons,
    bradley_terry_loss,
    comparisons,
    ensemble_mean,
    ensemble_uncertainty_weighted,
    ensemble_worst_case,
)

__all__ = [
    "Comparisons",
    "ReliabilityCurve",
    "TokenLogprobs",
    "agreement",
    "apo_zero_unpaired_loss",
    "bradley_terry_loss",
    "calibration_error",
    "cohen_kappa",
    "comparisons",
    "dpo_loss",
    "ensemble_mean",
    "ensemble_uncertainty_weighted",
    "ensemble_worst_case",
    "implicit_rewards",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto_loss",
    "kto_reference_point",
    "length_correlation",
    "longer_wins_accuracy",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "mean_and_std",
    "pairwise_accuracy",
    "perplexity",
    "reliability_curve",
    "sft_loss",
    "soft_overlong_penalty",
    "sum_by_sequence",
    "token_logprobs",
    "wilson_interval",
]
