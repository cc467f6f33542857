"""Decoder layers through ``torch.compile``: the same numbers, in fewer passes over memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface

from lightning_rlhf.models import attention
from lightning_rlhf.models.language_model import LanguageModel

__all__ = ["compile_layers", "copy_model", "uncompiled"]

VARIANTS = 64
"""Roles × {with, without gradient} × precisions of a layer; each is compiled once. PyTorch gives up after 8."""


def compile_layers(model: LanguageModel, backend: str = "inductor") -> None:
    """Compile the parts of every decoder layer (norms, attention, MLP) for rows of any length, when they are first run.

    The attention of a packed row itself stays as it is: which keys a query sees is another list in every batch. What
    is compiled is what is around it: projections with their adapters, norms, rotary embedding, activations. Parts and
    not layers, so that what checkpoints or gathers a layer stays outside.

    Args:
        model: Changed in place. Names of parameters and what a checkpoint holds stay as they are.
        backend: Of ``torch.compile``.

    Raises:
        ValueError: If Transformers does not say which modules are the model's layers, or if layers keep the results
            of some products (``gradient_checkpointing: selective``), which compilation would merge.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LanguageModel(LlamaForCausalLM(config))
        >>> compile_layers(model)
        >>> model.compiled_by
        'inductor'
    """
    if model.is_selective:
        raise ValueError(
            "the layers keep the results of some products for the backward (gradient_checkpointing: selective), and "
            "compilation would merge these: enable_gradient_checkpointing() without selective, or compile nothing"
        )
    # For all models of this process: what is not compiled calls the function through it as before.
    opaque = torch.compiler.disable(
        attention.shared_prefix_attention, reason="segments differ in every batch"
    )
    AttentionInterface.register(attention.NAME, opaque)
    for layer in model.layers:
        for part in layer.children():
            part.compile(dynamic=True, backend=backend, recompile_limit=VARIANTS)
    model.compiled_by = backend


@contextmanager
def uncompiled(model: LanguageModel) -> Iterator[None]:
    """Run the layers as they were written: while samples are drawn, every token has shapes of its own."""
    if model.compiled_by is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def copy_model(model: LanguageModel) -> LanguageModel:
    """A deep copy that is compiled as the model is: a copy of a module alone would not be."""
    own = copy.deepcopy(model)
    if model.compiled_by is not None:
        compile_layers(own, model.compiled_by)
    return own
