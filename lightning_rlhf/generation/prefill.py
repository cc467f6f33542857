"""The prompt's keys and values, computed once and shared by its samples.

``generate(num_return_sequences=n)`` repeats the prompts first and computes each n times.
"""

import inspect

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lightning_rlhf.models import LanguageModel


def shared_prefill(model: LanguageModel, ids: Tensor, mask: Tensor, num_samples: int) -> DynamicCache | None:
    """The cache of all prompt tokens but the last, repeated for the samples of each prompt.

    Args:
        model: The policy, in eval mode.
        ids: Prompts, ``(P, L)``, padded on the left.
        mask: 1 where a token stands, ``(P, L)``.
        num_samples: Samples a prompt.

    Returns:
        A cache of ``P · num_samples`` rows; None where there is nothing to share, or the model keeps something else
        than keys and values (state-space layers): the prompt is then computed for every sample.
    """
    if num_samples == 1 or ids.shape[1] == 1 or not keeps_keys_and_values(model):
        return None
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model.causal_lm.get_decoder()(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_repeat_interleave(num_samples)
    return cache


def keeps_keys_and_values(model: LanguageModel) -> bool:
    """Whether all that a model remembers of a prompt is keys and values, which can be repeated."""
    decoder = model.causal_lm.get_decoder()
    names = inspect.signature(decoder.forward).parameters
    if not {"past_key_values", "position_ids"} <= set(names):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
