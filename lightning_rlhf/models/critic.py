"""The critic: the value of every state of a completion."""

from contextlib import nullcontext

from torch import Tensor, nn

from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models.language_model import LanguageModel
from lightning_rlhf.models.scorer import Head

VALUE_ADAPTER = "value"


class Critic(nn.Module):
    """Values of the states in which the tokens of completions are chosen: a head that starts at 0.

    Args:
        model: The language model under the head.
        adapter: Run with the adapter of this name: the critic then shares the policy's base.
        owns: Whether the model is a part of this module; else it is only seen.
    """

    def __init__(self, model: LanguageModel, adapter: str | None = None, *, owns: bool) -> None:
        super().__init__()
        self.head = Head(model.config.get_text_config().hidden_size, std=0.0, bias=True)
        self.adapter = adapter
        if owns:
            self.model = model
        self._seen = (model,)

    def forward(self, batch: PackedBatch) -> Tensor:
        """The value before each token that counts is chosen, ``(M,)``, in a forward of its own."""
        (model,) = self._seen
        with nullcontext() if self.adapter is None else model.role(self.adapter):
            return self.of_hidden(model.hidden_states(batch))

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Values ``(M,)`` of hidden states ``(M, d)``."""
        values: Tensor = self.head(hidden)
        return values
