"""The tokenizer and the untrained model of the sandbox."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_rlhf.sandbox.language import TOKEN, vocabulary

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}
{%- else -%}
{{ message['content'] | trim + '\\n' }}
{%- endif -%}
{%- endfor -%}
"""
"""A conversation of one turn becomes the text of a plain prompt and its completion, closed by the end token."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, each with the space before it.

    Decoding what was encoded gives the same text, for every text of the sandbox; prompt and completion are encoded
    the same together as apart. Pad, begin, end and unknown tokens are distinct, and none is added by itself.
    """
    tokens = {token: index for index, token in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_policy(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, *, num_layers: int = 2
) -> LlamaForCausalLM:
    """A Llama of about 390,000 random weights, in float32.

    Args:
        tokenizer: Of :func:`build_tokenizer`; gives the size of the vocabulary and the special ids.
        seed: Of the weights; torch's own random state is left as it was.
        num_layers: Of some 190,000 weights each.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()
