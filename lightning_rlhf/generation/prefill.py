"""Keys and values while samples are drawn: those of a prompt computed once, and none copied at every token.

``generate(num_return_sequences=n)`` repeats the prompts first and computes each n times.
"""

import inspect
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lightning_rlhf.models import LanguageModel

SPARE = 64
"""Tokens that a layer's memory grows by."""


class SpareLayer(DynamicLayer):
    """Keys and values with room for tokens to come: most steps write their own and copy nothing.

    Transformers' layer concatenates, which copies all that is kept at every token.

    Args:
        keys: Those to start with, ``(B, heads, S, head_dim)``; None for none yet.
        values: Likewise.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None
        if keys is not None and values is not None:
            self.update(keys, values)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401 - as in DynamicLayer
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of new tokens; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or end > self._room[0].shape[-2]:
            self._room = (_with_room(self.keys, key_states, end), _with_room(self.values, value_states, end))
        keys, values = self._room
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values


def _with_room(kept: Tensor | None, like: Tensor, length: int) -> Tensor:
    """What is kept, in memory for ``length`` tokens and then some."""
    room = like.new_empty(*like.shape[:-2], -(-length // SPARE) * SPARE, like.shape[-1])
    if kept is not None and kept.numel():
        room[..., : kept.shape[-2], :] = kept
    return room


def sampling_cache(model: LanguageModel, ids: Tensor, mask: Tensor, num_samples: int) -> DynamicCache | None:
    """The cache to sample with: that of :func:`shared_prefill` or an empty one, its layers :class:`SpareLayer`.

    Args:
        model: The policy, in eval mode.
        ids: Prompts, ``(P, L)``, padded on the left.
        mask: 1 where a token stands, ``(P, L)``.
        num_samples: Samples a prompt.

    Returns:
        A cache; None where the model keeps something else than keys and values.
    """
    if not keeps_keys_and_values(model):
        return None
    cache = shared_prefill(model, ids, mask, num_samples) or DynamicCache(config=model.config)
    # A layer with a window keeps a fixed number of tokens, and is left as it is.
    cache.layers = [
        SpareLayer(layer.keys, layer.values) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


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
