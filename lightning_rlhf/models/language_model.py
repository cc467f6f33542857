"""A causal language model that scores completions: one forward for every algorithm."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from lightning_rlhf.data.packing import PackedBatch, PaddedBatch
from lightning_rlhf.functional import TokenLogprobs, token_logprobs
from lightning_rlhf.models import attention
from lightning_rlhf.models.checkpointing import HostMemory, selective_contexts
from lightning_rlhf.models.settings import Layout, check_choice

Places = Literal["predictors", "ends", "completions"]
LOGITS_AT_A_TIME = 2**26
"""256 MiB in float32: as many positions are projected to the vocabulary at a time."""

ROPE_BY_LONGEST = ("longrope", "dynamic")
"""Rotary embeddings that depend on the longest row of a batch: packed and padded then differ by design."""


class LanguageModel(nn.Module):
    """Log-probabilities of completions under a Transformers or PEFT causal language model.

    Its ``forward`` is what a strategy wraps: backbone and head both run inside it, so that sharding hooks, LoRA on
    the head and a quantised head all work.

    Args:
        model: A causal language model of Transformers, or one with PEFT adapters.
        layout: ``shared_prefix``, or ``padded``. The former falls back to the latter, with one warning that says
            why, where a probe finds that the model does not honour it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_rlhf.data.packing import PromptGroup, pack
        >>> config = LlamaConfig(
        ...     vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LanguageModel(LlamaForCausalLM(config))
        >>> model(pack([PromptGroup([5, 6], [[7, 8], [9]])])).logprobs.shape
        torch.Size([3])
    """

    def __init__(self, model: PreTrainedModel | PeftModel, layout: Layout = "shared_prefix") -> None:
        super().__init__()
        check_choice("layout", layout, Layout)
        self._modules["model"] = model
        self.layout: Layout = layout
        self.layout_reason = "as asked"
        self.is_gathered = False  # see models.sharding
        self.stored: frozenset[str] = frozenset()  # sharded 4-bit weights, which no cast may touch
        self.compiled_by: str | None = None  # see models.compilation
        self._warned_of_context = False
        self.is_selective = False
        self.offload: Callable[[], AbstractContextManager[Any]] = nullcontext
        if layout == "shared_prefix":
            self._attach()

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The Transformers model, or the PEFT model around it; not the unit of FSDP1 that may be around both."""
        found = self._modules["model"]
        inner = found.module if isinstance(found, FullyShardedDataParallel) else found
        return cast(PreTrainedModel | PeftModel, inner)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Transformers model, adapters inside its layers."""
        return cast(
            PreTrainedModel, self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        )

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers.

        Raises:
            ValueError: If Transformers does not say which modules they are.
        """
        names = set(self.causal_lm._no_split_modules or ())
        layers = [part for part in self.causal_lm.modules() if type(part).__name__ in names]
        if not layers:
            raise ValueError(
                f"{type(self.causal_lm).__name__} does not say what its layers are (_no_split_modules): it can be "
                "neither sharded nor compiled. Use DDP, and policy.compile: false"
            )
        return layers

    @property
    def config(self) -> Any:  # noqa: ANN401 - every architecture has its own class
        """The Transformers configuration."""
        return self.causal_lm.config

    def _attach(self) -> None:
        from lightning_rlhf.models.probe import why_not_shared_prefix

        reason = why_not_shared_prefix(self.causal_lm)
        if reason is None:
            self.causal_lm.set_attn_implementation(attention.NAME)
            self.layout_reason = f"{type(self.causal_lm).__name__} equals the padded layout on a shrunk copy"
            return
        self.layout, self.layout_reason = "padded", reason
        warnings.warn(
            f"{type(self.causal_lm).__name__} runs in the padded layout: {reason}. "
            "Results are the same; prompts are computed once a completion.",
            stacklevel=3,
        )

    def forward(
        self,
        batch: PackedBatch,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        with_collision: bool = False,
        learned: int | None = None,
    ) -> TokenLogprobs:
        """Score every target of a batch.

        Args:
            batch: Prompt groups, on the model's device.
            temperature: Divides the logits.
            with_entropy: Also return the entropy at every target.
            with_collision: Also return the logarithm of the collision probability at every target.
            learned: How many completions of a prompt are learnt from, its first ones; the values of the others have no
                gradient, so that nothing of them is kept for a backward, and no entropy or collision probability (nan).
                None for all.

        Returns:
            One value per target, completion by completion: sum them by ``batch.target_lengths``.
        """
        if not torch.is_grad_enabled() or (
            learned is not None and learned >= max(map(len, batch.completion_lengths))
        ):
            learned = None
        # Not by the public method: a sharding hook on each would free the weights after the inner one.
        hidden = self._hidden_states(batch, "predictors", learned)
        score = partial(
            self.of_hidden,
            temperature=temperature,
            with_entropy=with_entropy,
            with_collision=with_collision,
        )
        if learned is None:
            return score(hidden, batch.targets)
        first = zip(batch.are_first(learned), batch.num_targets, strict=True)
        here, others = _by_flag([flag for flag, count in first for _ in range(count)], hidden.device)
        with_gradient = score(hidden[here], batch.targets[here])
        with torch.no_grad():
            without = self.of_hidden(hidden[others], batch.targets[others], temperature=temperature)
        order = torch.cat([here, others]).argsort()
        nothing = without.logprobs.new_full((len(others),), torch.nan)
        return TokenLogprobs._make(
            None if a is None else torch.cat([a, nothing if b is None else b])[order]
            for a, b in zip(with_gradient, without, strict=True)
        )

    def of_hidden(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        with_collision: bool = False,
    ) -> TokenLogprobs:
        """Score targets ``(M,)`` by the hidden states ``(M, H)`` that predict them."""
        return token_logprobs(
            hidden,
            self.logits,
            targets,
            temperature=temperature,
            with_entropy=with_entropy,
            with_collision=with_collision,
            chunk_size=self.chunk_size,
        )

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt + completion that the model was made for; None where its configuration does not say."""
        length: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return length

    @property
    def chunk_size(self) -> int:
        """Positions that are projected to the vocabulary at a time."""
        return max(1, LOGITS_AT_A_TIME // self.config.get_text_config().vocab_size)

    def hidden_states(self, batch: PackedBatch, at: Places = "predictors") -> Tensor:
        """The last hidden state at every position that predicts a target, ends a completion or is part of one."""
        return self._hidden_states(batch, at, None)

    def _hidden_states(self, batch: PackedBatch, at: Places, learned: int | None) -> Tensor:
        """With ``learned``, those of further completions are of a second forward, without gradient."""
        self._check_fits(batch)
        if self.layout_of(batch) == "padded":
            padded = batch.padded()
            return self._padded(padded, batch.are_first(learned)).index_select(0, getattr(padded, at))
        return self._packed(batch, learned).index_select(0, getattr(batch, at))

    def _padded(self, batch: PaddedBatch, learned: list[bool]) -> Tensor:
        """The last hidden state at every place of every row, ``(N·L, H)``."""

        def of_rows(rows: Tensor) -> Tensor:
            with self.offload():
                output = self.causal_lm.get_decoder()(
                    input_ids=batch.input_ids[rows],
                    attention_mask=batch.attention_mask[rows],
                    use_cache=False,
                )
            return cast(Tensor, output.last_hidden_state)

        first, others = _by_flag(learned, batch.input_ids.device)
        if not len(others):
            return of_rows(first).flatten(0, 1)
        hidden = of_rows(first)
        with torch.no_grad():
            after = of_rows(others)
        return torch.cat([hidden, after])[torch.cat([first, others]).argsort()].flatten(0, 1)

    def _packed(self, batch: PackedBatch, learned: int | None) -> Tensor:
        """The last hidden state of every token of the row, ``(T, H)``."""
        if learned is None:
            plan = attention.SharedPrefixPlan(batch.segments, batch.position_ids)
            return self._of_row(batch.input_ids, plan)
        first, others = batch.parts(learned)
        here, there = (part.tokens.to(batch.input_ids.device, non_blocking=True) for part in (first, others))
        plan = attention.SharedPrefixPlan(first.segments, batch.position_ids[here], kept={})
        hidden = self._of_row(batch.input_ids[here], plan)
        with torch.no_grad():
            following = attention.SharedPrefixPlan(others.segments, batch.position_ids[there], after=plan)
            after = self._of_row(batch.input_ids[there], following)
        # Gradient checkpointing computes the first forward again, and need not keep them again.
        plan.kept = None
        return torch.cat([hidden, after])[torch.cat([here, there]).argsort()]

    def _of_row(self, input_ids: Tensor, plan: attention.SharedPrefixPlan) -> Tensor:
        with self.offload():
            output = self.causal_lm.get_decoder()(
                input_ids=input_ids[None],
                position_ids=plan.position_ids[None],
                # A mask that is already four-dimensional is left as it is: Transformers would otherwise see positions
                # that restart and build a dense one. The attention reads the plan and never this tensor.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
                use_cache=False,
                shared_prefix=plan,
            )
        return cast(Tensor, output.last_hidden_state[0])

    def touch(self) -> None:
        """Nothing: what sharding does before a forward happens for this call alone."""

    def _check_fits(self, batch: PackedBatch) -> None:
        """By what the host knows of a batch, so that nothing waits for the device.

        Raises:
            ValueError: If a token id has no row in the embedding.
        """
        rows = cast(Tensor, self.causal_lm.get_input_embeddings().weight).shape[0]
        if batch.largest_id >= rows:
            raise ValueError(
                f"token id {batch.largest_id} in the batch of rows {list(batch.row_ids)[:8]}, and the model's "
                f"embedding has {rows} rows: the data was tokenised with another model's tokenizer; leave the "
                "datamodule's tokenizer out, and it takes the module's"
            )
        room = self.context_length
        if room is not None and batch.max_positions > room and not self._warned_of_context:
            self._warned_of_context = True
            warnings.warn(
                f"a row has {batch.max_positions} tokens, and the model's context is {room}: set the datamodule's "
                "max_length (rows are cut and counted), or expect little from what is past it",
                stacklevel=2,
            )

    def layout_of(self, batch: PackedBatch) -> Layout:
        """The layout of this batch: padded past the original context where rotary factors follow the longest row."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if self.layout == "shared_prefix" and rope.get("rope_type") in ROPE_BY_LONGEST:
            original = rope.get("original_max_position_embeddings") or self.config.max_position_embeddings
            if batch.max_positions > original:
                return "padded"
        return self.layout

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(m, V)`` of hidden states ``(m, H)``: the head and what the architecture does after it."""
        logits = self.causal_lm.get_output_embeddings()(hidden)
        for setting, transform in LOGIT_TRANSFORMS.items():
            value = getattr(self.config, setting, None)
            if value is not None:
                logits = transform(logits, value)
        return logits

    @contextmanager
    def _switched(self, active: list[str], disabled: bool) -> Iterator["LanguageModel"]:
        layers = self._tuner_layers()
        before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = active, disabled
        try:
            yield self
        finally:
            for layer, (was_active, was_disabled) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = was_active, was_disabled

    def _tuner_layers(self) -> list[BaseTunerLayer]:
        return [module for module in self.modules() if isinstance(module, BaseTunerLayer)]

    @property
    def active_adapter(self) -> str | None:
        """The adapter of the role that it runs as; None for the base alone."""
        layer = next(iter(self._tuner_layers()), None)
        if layer is None or layer._disable_adapters:
            return None
        active = layer._active_adapter
        return active if isinstance(active, str) else next(iter(active), None)

    def role(self, adapter: str | None) -> AbstractContextManager["LanguageModel"]:
        """Run as another role on the same base: with the adapter of this name, or the base alone for None.

        Only which adapter is active changes, and never ``requires_grad``: PEFT's own switches freeze the adapters
        they leave, which silently zeroes their gradients and hides them from DDP. The backward may run outside: what
        gradient checkpointing computes again runs in the role of its forward.
        """
        return self._switched([] if adapter is None else [adapter], disabled=adapter is None)

    def enable_gradient_checkpointing(self, *, selective: bool = False, offload: bool = False) -> None:
        """Compute activations again in the backward instead of keeping them.

        Args:
            selective: Keep the results of attention and of the products with the weights.
            offload: Hold the layers' inputs in the host's memory.

        Raises:
            ValueError: If the layers are compiled and some results would be kept.
        """
        if selective and self.compiled_by is not None:
            raise ValueError(
                "the layers are compiled, which merges the products that selective would keep: leave selective out"
            )
        self.is_selective = selective
        self.offload = HostMemory if offload else nullcontext
        self.causal_lm.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": self._checkpoint_contexts}
        )

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For the forward of a layer and for computing it again: the role of now. All layers are in the same one."""
        forward, again = selective_contexts() if self.is_selective else (nullcontext(), nullcontext())
        layer = next((m for m in self.modules() if isinstance(m, BaseTunerLayer)), None)
        if layer is None:
            return forward, again
        active, disabled = layer._active_adapter, layer._disable_adapters
        return forward, _both(self._switched(cast(list[str], active), disabled), again)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LanguageModel":
        # Adapters stay float32 whatever precision the Trainer casts the module to: an update of 1e-5 does not
        # register in bfloat16.
        kept = [
            p
            for n, p in self.named_parameters()
            if n in self.stored or (p.dtype == torch.float32 and is_adapter(n))
        ]
        places = {id(t) for p in kept for t in (p, p.grad) if t is not None}

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if id(tensor) in places else changed

        super()._apply(moved, recurse)
        return self


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


def _by_flag(flags: Sequence[bool], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of what has a flag, and of what has none; by what the host knows, so that nothing waits."""
    marked, others = (
        torch.tensor([i for i, flag in enumerate(flags) if flag is wanted], dtype=torch.long)
        for wanted in (True, False)
    )
    return marked.to(device), others.to(device)


LOGIT_TRANSFORMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logits_scaling": lambda logits, value: logits / value,  # Granite
    "logit_scale": lambda logits, value: logits * value,  # Cohere
    "final_logit_softcapping": lambda logits, value: torch.tanh(logits / value) * value,  # Gemma 2
}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to a PEFT adapter.

    Example:
        >>> is_adapter("model.layers.0.q_proj.lora_A.policy.weight"), is_adapter("model.layers.0.q_proj.weight")
        (True, False)
    """
    return ".lora_" in name


def disable_dropout(module: nn.Module) -> None:
    """Set every dropout probability to 0, in layers and in what attention reads from the configuration.

    Not ``eval()``: that would also switch off gradient checkpointing in Transformers.

    Args:
        module: Changed in place.
    """
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "resid_dropout", "embd_dropout"):
            if isinstance(child.__dict__.get(name), float):
                setattr(child, name, 0.0)


def freeze_vocabulary_head(model: LanguageModel) -> None:
    """Take an unused vocabulary projection out of training; where it is the embedding, that is trained as such.

    Args:
        model: Changed in place.
    """
    projection = model.causal_lm.get_output_embeddings()
    if projection.weight is not model.causal_lm.get_input_embeddings().weight:
        projection.requires_grad_(False)
