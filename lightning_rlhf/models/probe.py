"""Does a model honour the shared-prefix layout? Asked of a small float32 copy before the layout is used.

Accepting the attention's name is not enough: Falcon and BLOOM accept it, ignore it and compute wrong numbers.
"""

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from lightning_rlhf.models import attention

TOLERANCE = 1e-4
WINDOW = 5
VOCABULARY = 64
MISFITS = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)
"""What an architecture raises when it is handed widths or an attention that it was not written for."""
_WIDTHS = {
    "num_attention_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "ffn_dim": 96,
    "n_inner": 96,
    "word_embed_proj_dim": 64,
}
_verdicts: dict[str, str | None] = {}


class UnknownLogitsError(NotImplementedError):
    """The model changes its logits in a way that is not known here: its log-probabilities would be wrong."""


def why_not_shared_prefix(model: PreTrainedModel) -> str | None:
    """Compare the packed layout with one row per completion on a shrunk random copy of a model.

    Args:
        model: Any causal language model; only its class and configuration are read.

    Returns:
        None where both agree, else the reason, ready for a warning.
    """
    config = model.config.to_dict()
    key = type(model).__name__ + json.dumps(config, sort_keys=True, default=str)
    if key not in _verdicts:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            _verdicts[key] = _verdict(model)
    return _verdicts[key]


def _verdict(model: PreTrainedModel) -> str | None:
    from lightning_rlhf.models.language_model import LanguageModel

    batch = _probe_batch()
    clone = shrunken_copy(model)
    reference = LanguageModel(clone, layout="padded")
    with torch.no_grad():
        expected = _plain_logprobs(clone, batch)
        if not torch.allclose(reference(batch).logprobs, expected, atol=TOLERANCE):
            raise UnknownLogitsError(
                f"{type(model).__name__} does something to its logits after the head that lightning_rlhf does not "
                f"know; add it to LOGIT_TRANSFORMS"
            )
        try:
            clone.set_attn_implementation(attention.NAME)
            reference.layout = "shared_prefix"
            found = reference(batch).logprobs
        except (
            TypeError,
            ValueError,
            RuntimeError,
            IndexError,
            AttributeError,
            KeyError,
            NotImplementedError,
        ) as error:
            return (
                f"it does not run with shared-prefix attention ({type(error).__name__}: {str(error)[:120]})"
            )
    gap = (found - expected).abs().max().item()
    if gap < TOLERANCE:
        return None
    return f"on a shrunk copy its log-probabilities differ by {gap:.2g} from one row per completion"


def _probe_batch() -> PackedBatch:
    """Prompts longer than the shrunk window, several completions, groups of different size."""
    draw = lambda n: torch.randint(3, VOCABULARY, (n,)).tolist()  # noqa: E731
    return pack([PromptGroup(draw(9), [draw(4), draw(3), draw(6)]), PromptGroup(draw(2), [draw(7), draw(1)])])


def _plain_logprobs(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The model's own logits, one prompt + completion at a time: no padding, no layout, no code of ours."""
    padded = batch.padded()
    rows = [
        model(input_ids=ids[mask][None]).logits[0].log_softmax(-1)
        for ids, mask in zip(padded.input_ids, padded.attention_mask, strict=True)
    ]
    width = padded.input_ids.shape[1]
    at = [(index // width, index % width) for index in padded.predictors.tolist()]
    return torch.stack(
        [rows[row][column, target] for (row, column), target in zip(at, batch.targets, strict=True)]
    )


def shrunken_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A random float32 model of the same class, narrow and shallow, with weights large enough to show differences.

    Args:
        model: Only its class and configuration are read.

    Returns:
        The copy, in eval mode. Where the architecture does not allow the small widths (rotary factors given as a
        list, say), only its depth is reduced.
    """
    for narrow in (True, False):
        try:
            clone = type(model)(_shrunken_config(model.config, narrow))
            with torch.no_grad():
                clone(input_ids=torch.arange(3, 3 + 4)[None])
            break
        except MISFITS:
            if not narrow:
                raise
    for parameter in clone.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return clone.float().eval()


def _shrunken_config(config: Any, narrow: bool) -> Any:  # noqa: ANN401 - every architecture has its own class
    small = copy.deepcopy(config)
    small._attn_implementation = "eager"
    small.dtype = torch.float32
    values = small.to_dict()
    types = list(dict.fromkeys(values.get("layer_types") or []))
    small.num_hidden_layers = max(2, len(types))
    if types:
        small.layer_types = [types[i % len(types)] for i in range(small.num_hidden_layers)]
    if values.get("sliding_window"):
        small.sliding_window = WINDOW
    if not narrow:
        return small
    mapped = {**{name: name for name in values}, **small.attribute_map}
    ratio = max(
        1, config.num_attention_heads // (values.get("num_key_value_heads") or config.num_attention_heads)
    )
    for name, size in _WIDTHS.items():
        if values.get(mapped.get(name, "")) is not None:
            setattr(small, name, min(size, getattr(config, name)))
    if values.get("num_key_value_heads") is not None:
        small.num_key_value_heads = max(1, small.num_attention_heads // ratio)
    if values.get("head_dim") is not None:
        small.head_dim = 16
    small.vocab_size = VOCABULARY
    small.pad_token_id, small.bos_token_id, small.eos_token_id = 0, 1, 2
    return small
