"""Tensors in, tensors out: the mathematics of RLHF, importing torch only.

Losses return one value per pair, sequence or token; whoever calls them reduces. Statistics and fits, which do
reduce, say so by their names.
"""

from lightning_rlhf.functional.advantages import gae, grpo_advantages, reinforce_advantages, rloo_advantages
from lightning_rlhf.functional.annotators import agreement, cohen_kappa
from lightning_rlhf.functional.best_of_n import (
    BestOfNCurve,
    best_of_n_curve,
    best_of_n_expectation,
    best_of_n_kl,
)
from lightning_rlhf.functional.calibration import ReliabilityCurve, calibration_error, reliability_curve
from lightning_rlhf.functional.decline import (
    DeclineTest,
    decline_statistic,
    decline_statistic_unpaired,
    decline_test,
    decline_threshold,
)
from lightning_rlhf.functional.divergence import divergence_scores
from lightning_rlhf.functional.goodhart import GoodhartEstimate, goodhart_gap
from lightning_rlhf.functional.intervals import newcombe_interval, wilson_interval
from lightning_rlhf.functional.kl import kl_k1, kl_k2, kl_k3
from lightning_rlhf.functional.kl_control import adaptive_kl_coef
from lightning_rlhf.functional.kto import apo_zero_unpaired_loss, kto_loss, kto_reference_point
from lightning_rlhf.functional.language_modeling import perplexity, sft_loss
from lightning_rlhf.functional.length import length_correlation, longer_wins_accuracy, soft_overlong_penalty
from lightning_rlhf.functional.length_controlled import length_controlled_win_rate
from lightning_rlhf.functional.length_normalized import ipo_loss, length_normalized_dpo_loss
from lightning_rlhf.functional.logprobs import (
    TokenComparison,
    TokenLogprobs,
    compare_logprobs,
    sum_by_sequence,
    token_kl,
    token_logprobs,
)
from lightning_rlhf.functional.margin_losses import (
    discopop_loss,
    exo_loss,
    hinge_loss,
    robust_dpo_loss,
)
from lightning_rlhf.functional.masking import masked_mean, masked_var, masked_whiten
from lightning_rlhf.functional.moments import mean_and_std
from lightning_rlhf.functional.odin import odin_length_loss, odin_orthogonality
from lightning_rlhf.functional.overoptimization import OveroptimizationFit, fit_overoptimization
from lightning_rlhf.functional.pointwise_losses import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    nca_loss,
    sppo_loss,
)
from lightning_rlhf.functional.ppo import (
    approx_kl,
    clip_fraction,
    ppo_policy_loss,
    ppo_value_loss,
    ratio,
    truncated_importance_weights,
    value_clip_fraction,
)
from lightning_rlhf.functional.preference import (
    dpo_loss,
    implicit_rewards,
    pairwise_accuracy,
    smoothed_logistic,
)
from lightning_rlhf.functional.ragged import pad_by_sequence, unpad
from lightning_rlhf.functional.rank_correlation import kendall_correlation, spearman_correlation
from lightning_rlhf.functional.ranking import (
    Comparisons,
    bradley_terry_loss,
    comparisons,
    ensemble_mean,
    ensemble_uncertainty_weighted,
    ensemble_worst_case,
)
from lightning_rlhf.functional.reference_free import (
    cpo_loss,
    log_odds_ratio,
    orpo_loss,
    sft_term,
    simpo_loss,
)
from lightning_rlhf.functional.rewards import apply_missing_eos_penalty, token_rewards
from lightning_rlhf.functional.sequence_weights import length_desensitized_sum, wpo_weights
from lightning_rlhf.functional.transport_losses import aot_loss, aot_unpaired_loss

__all__ = [
    "BestOfNCurve",
    "Comparisons",
    "DeclineTest",
    "GoodhartEstimate",
    "OveroptimizationFit",
    "ReliabilityCurve",
    "TokenComparison",
    "TokenLogprobs",
    "adaptive_kl_coef",
    "agreement",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "apply_missing_eos_penalty",
    "approx_kl",
    "bco_loss",
    "best_of_n_curve",
    "best_of_n_expectation",
    "best_of_n_kl",
    "bradley_terry_loss",
    "calibration_error",
    "clip_fraction",
    "cohen_kappa",
    "compare_logprobs",
    "comparisons",
    "cpo_loss",
    "decline_statistic",
    "decline_statistic_unpaired",
    "decline_test",
    "decline_threshold",
    "discopop_loss",
    "divergence_scores",
    "dpo_loss",
    "ensemble_mean",
    "ensemble_uncertainty_weighted",
    "ensemble_worst_case",
    "exo_loss",
    "fit_overoptimization",
    "gae",
    "goodhart_gap",
    "grpo_advantages",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "kendall_correlation",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto_loss",
    "kto_reference_point",
    "length_controlled_win_rate",
    "length_correlation",
    "length_desensitized_sum",
    "length_normalized_dpo_loss",
    "log_odds_ratio",
    "longer_wins_accuracy",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "mean_and_std",
    "nca_loss",
    "newcombe_interval",
    "odin_length_loss",
    "odin_orthogonality",
    "orpo_loss",
    "pad_by_sequence",
    "pairwise_accuracy",
    "perplexity",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ratio",
    "reinforce_advantages",
    "reliability_curve",
    "rloo_advantages",
    "robust_dpo_loss",
    "sft_loss",
    "sft_term",
    "simpo_loss",
    "smoothed_logistic",
    "soft_overlong_penalty",
    "spearman_correlation",
    "sppo_loss",
    "sum_by_sequence",
    "token_kl",
    "token_logprobs",
    "token_rewards",
    "truncated_importance_weights",
    "unpad",
    "value_clip_fraction",
    "wilson_interval",
    "wpo_weights",
]
