"""Tensors in, tensors out: the mathematics of RLHF, importing torch only.

Losses return one value per pair, sequence or token; whoever calls them reduces. Statistics and fits, which do
reduce, say so by their names.
"""

from lightning_rlhf.functional.kl import kl_k1, kl_k2, kl_k3
from lightning_rlhf.functional.kto import apo_zero_unpaired_loss, kto_loss, kto_reference_point
from lightning_rlhf.functional.language_modeling import perplexity, sft_loss
from lightning_rlhf.functional.logprobs import TokenLogprobs, sum_by_sequence, token_logprobs
from lightning_rlhf.functional.masking import masked_mean, masked_var, masked_whiten
from lightning_rlhf.functional.preference import dpo_loss, implicit_rewards, pairwise_accuracy

__all__ = [
    "TokenLogprobs",
    "apo_zero_unpaired_loss",
    "dpo_loss",
    "implicit_rewards",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto_loss",
    "kto_reference_point",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "pairwise_accuracy",
    "perplexity",
    "sft_loss",
    "sum_by_sequence",
    "token_logprobs",
]
