"""A module whose checkpoints hold what is trained, and fit any strategy and number of ranks that can read them."""

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lightning_rlhf.algorithms.checkpoints import (
    Shapes,
    beside_parameters,
    by_parameter,
    require_fit,
    require_shapes,
    shapes,
)
from lightning_rlhf.algorithms.strategies import keeps_gradients, shards_weights
from lightning_rlhf.metrics import Total
from lightning_rlhf.models.language_model import is_adapter
from lightning_rlhf.models.sharding_fsdp1 import WRAPPER

NUM_TOKENS = "num_tokens.total"


class Checkpointed(L.LightningModule):
    """Names, states and checkpoints of a module, the same under every strategy."""

    num_tokens: Total
    _shapes: Shapes | None = None  # of what state_dict holds, where FSDP1 flattens weights

    @property
    def _fsdp1(self) -> FSDPStrategy | None:
        strategy = None if self._trainer is None else self.trainer.strategy
        return strategy if isinstance(strategy, FSDPStrategy) else None

    @property
    def is_sharded(self) -> bool:
        """Whether weights are spread over ranks, so that every forward waits for all ranks."""
        return self._trainer is not None and shards_weights(self.trainer.strategy)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:  # noqa: ANN401
        """By the names that they have under any strategy."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.replace(WRAPPER, ""), parameter

    @property
    def _strategy_keeps_states(self) -> bool:
        return self._trainer is not None and keeps_gradients(self.trainer.strategy)

    @property
    def _strategy_loads(self) -> bool:
        """Whether it does so itself, and would ask for frozen weights."""
        return self.is_sharded or self._strategy_keeps_states

    def _expected(self) -> Shapes:
        """Of what a checkpoint has to hold."""
        return self._shapes or shapes(self.state_dict())

    @property
    def loaded_models(self) -> tuple[str, ...]:
        """How names of models start that are loaded again: of their weights checkpoints hold what is trained."""
        return ("policy.", "reference.", "critic.model.")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401
        """Everything but what is frozen of models that come from where they were loaded."""
        state = super().state_dict(*args, **kwargs)
        trained = {
            n for n, p in self.named_parameters(remove_duplicate=False) if p.requires_grad or is_adapter(n)
        }
        return {
            name: value
            for name, value in state.items()
            if name in trained or not name.startswith(self.loaded_models)
        }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:  # noqa: ANN401
        """Load what :meth:`state_dict` saved; the frozen base is not expected.

        Raises:
            RuntimeError: If an adapter, head or trained weight is missing, unknown or of another shape.
        """
        require = require_fit if strict else require_shapes
        require(self._expected(), shapes(state_dict), type(self).__name__)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    @property
    def strict_loading(self) -> bool:
        """As in Lightning; False where the strategy would ask for frozen weights: :meth:`on_load_checkpoint` looks."""
        return not self._strategy_loads and super().strict_loading

    @strict_loading.setter
    def strict_loading(self, strict: bool) -> None:
        L.LightningModule.strict_loading.fset(self, strict)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down which algorithm this is, and what FSDP and DeepSpeed need to go on from it."""
        checkpoint["algorithm"] = type(self).__name__
        state = self.state_dict() if self._shapes is None else checkpoint["state_dict"]  # gathered already
        checkpoint["shapes"] = self._shapes or shapes(state)
        frozen_too = not self._strategy_keeps_states
        parameters = [n for n, p in self.named_parameters() if p.requires_grad or frozen_too]
        beside = beside_parameters(state, parameters)
        if self._trainer is not None:  # of all ranks: the first one takes it all when it goes on
            beside[NUM_TOKENS] = self.trainer.strategy.reduce(self.num_tokens.total.clone(), reduce_op="sum")
        checkpoint["beside_parameters"] = beside
        states = checkpoint.get("optimizer_states", [])
        by_place = not self._strategy_keeps_states  # DeepSpeed's strategy is a DDPStrategy as well
        if states and by_place and isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            checkpoint["optimizer_states"] = [
                by_parameter(optimizer_state, optimizer.param_groups, self.parameters())
                for optimizer_state, optimizer in zip(states, self.trainer.optimizers, strict=True)
            ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another algorithm; under FSDP and DeepSpeed, load what they leave out.

        Raises:
            ValueError: If it is one.
            RuntimeError: If its weights do not fit; see :meth:`load_state_dict`.
        """
        found = checkpoint.get("algorithm")
        if found != type(self).__name__:
            raise ValueError(
                f"this is a checkpoint of {found or 'something else'}, not of {type(self).__name__}: to start from "
                "its weights, export it with `lightning-rlhf export` and give the directory as the policy's path"
            )
        beside = checkpoint["beside_parameters"]
        if self._trainer is not None and not self.trainer.is_global_zero:
            beside[NUM_TOKENS] = torch.zeros_like(beside[NUM_TOKENS])
        if self._strategy_loads:
            require_fit(self._expected(), checkpoint["shapes"], type(self).__name__)
            here = {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in beside.items()}
            super().load_state_dict(here, strict=False)
        else:
            checkpoint["state_dict"][NUM_TOKENS] = beside[NUM_TOKENS]
