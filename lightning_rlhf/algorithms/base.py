"""What every algorithm shares: its policy, its optimizer, exact means over a step, and metrics."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.algorithms.checkpointed import Checkpointed
from lightning_rlhf.algorithms.optimization import Optimization, build_optimizer, build_schedule
from lightning_rlhf.algorithms.strategies import (
    HALF_PRECISION,
    ends_step,
    require_fsdp1,
    require_storage,
    require_whole_steps,
    require_zero_stage,
    scale_gradients,
    unscale_losses,
)
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.metrics import Mean, Total
from lightning_rlhf.models import LanguageModel, Policy, load_language_model, load_tokenizer
from lightning_rlhf.models.language_model import is_adapter
from lightning_rlhf.models.settings import from_plain
from lightning_rlhf.models.sharding import data_parallel, reshard, shard_all
from lightning_rlhf.models.sharding_fsdp1 import clip_shards, wrap_all


class NonFiniteLossError(RuntimeError):
    """The loss of an optimizer step was nan or infinite; the message names step, rows and the last checkpoint."""


class Algorithm(Checkpointed):
    """Base of all algorithms: a LightningModule around a policy.

    Subclasses write ``losses``, and a ``training_step`` that returns ``self.step_mean(self.losses(…), batch)``.

    Args:
        policy: A path or Hub id, :class:`Policy` settings, or a built Transformers or PEFT model.
        tokenizer: Needed with a built model; else the policy's own.
        optimization: Optimizer and schedule.
    """

    metric_names: tuple[str, ...] = ()
    clip_remedy = "set gradient_clip_val"
    policy: LanguageModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        policy: "Policy | str | nn.Module",
        tokenizer: PreTrainedTokenizerBase | None,
        optimization: Optimization | None,
    ) -> None:
        super().__init__()
        self.policy_settings, built = as_policy(policy)
        self.optimization = from_plain(Optimization, optimization) or Optimization()
        if isinstance(tokenizer, str):
            raise TypeError(
                f"tokenizer must be a tokenizer, got the text {tokenizer!r}: load it with "
                "AutoTokenizer.from_pretrained"
            )
        if tokenizer is not None:
            self.tokenizer = tokenizer
        elif self.policy_settings is not None:
            remote = self.policy_settings.trust_remote_code
            self.tokenizer = load_tokenizer(self.policy_settings.path, trust_remote_code=remote)
        else:
            raise ValueError("a built model needs its tokenizer: pass tokenizer=… as well")
        if built is not None:
            self.policy = as_language_model(built)
        self.metrics = nn.ModuleDict(
            {
                metric_key(stage, name): self.new_metric(name)
                for stage in ("train", "val", "test")
                for name in self.metric_names
            }
        )
        self.num_tokens = Total()
        self._counted: Tensor | int = 0
        self._loss_sum: Tensor | float = 0.0
        self._rows: list[int] = []
        self._stepped = False

    # --- building -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what a strategy cannot do here; a subclass's own calls this one."""
        require_zero_stage(self.trainer.strategy)
        require_fsdp1(self.trainer)
        if self.policy_settings is not None:
            require_storage(self.trainer, self.policy_settings.quantization)

    def on_train_start(self) -> None:
        """Refuse steps that a strategy would count in another way than the Trainer."""
        require_whole_steps(self.trainer)

    def configure_model(self) -> None:
        """Load the policy, once: Lightning calls this inside the strategy's context."""
        if "policy" not in self._modules and self.policy_settings is not None:
            self.policy = load_language_model(self.policy_settings)
            self.on_policy_loaded()
        if self.device_mesh is not None:
            shard_all(self, data_parallel(self.device_mesh))
        elif self._fsdp1 is not None:
            self._shapes = self._expected()
            wrap_all(self, self._fsdp1.root_device, self._fsdp1.mixed_precision_config)

    def on_policy_loaded(self) -> None:
        """What an algorithm does with the untrained policy, such as making its reference."""

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with warmup and cosine decay, or what ``optimization`` says.

        Raises:
            ValueError: If weights in half precision would be fully fine-tuned, which hardly moves them, or if the
                schedule needs an end that the Trainer does not have.
        """
        self._refuse_half_precision_weights()
        self._refuse_endless_schedule()
        optimizer = build_optimizer(self.named_parameters(), self.optimization, shapes=self._shapes)
        schedule = build_schedule(
            optimizer, self.optimization, lambda: self.trainer.estimated_stepping_batches
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": LRSchedulerConfigType(scheduler=schedule, interval="step"),
        }

    def _refuse_half_precision_weights(self) -> None:
        precision = self.trainer.precision
        if precision not in HALF_PRECISION or self.optimization.allow_half_precision_weights:
            return
        if not any(is_adapter(name) for name, _ in self.named_parameters()):
            raise ValueError(
                f"precision {precision!r} with full fine-tuning rounds most updates away (at lr 1e-6 only 2% of the "
                "weights move in 100 steps): use bf16-mixed, or LoRA, or set "
                "optimization.allow_half_precision_weights: true"
            )

    def _refuse_endless_schedule(self) -> None:
        endless = self.trainer.max_epochs == self.trainer.max_steps == -1
        if endless and self.optimization.schedule != "constant":
            raise ValueError(
                f"schedule {self.optimization.schedule!r} needs the number of steps, and this Trainer has no end: set "
                "max_steps or max_epochs, or choose optimization.schedule: constant"
            )

    # --- one optimizer step ---------------------------------------------------------------------------------------

    def step_mean(self, losses: Tensor, batch: PackedBatch) -> Tensor:
        """The loss to return from ``training_step``: its gradient becomes that of the mean over the whole step.

        Lightning divides by a fixed number of micro-batches, even in a last, shorter window, and knows nothing of
        how many tokens each holds. So the sum is returned here, and :meth:`on_before_optimizer_step` divides the
        gradient by what was counted over all micro-batches and ranks.

        Args:
            losses: One loss per token or pair.
            batch: Where they come from.

        Returns:
            The sum of the losses.
        """
        self._counted = self._counted + losses.numel()
        self._rows.extend(batch.row_ids)
        return self.step_sum(losses)

    def step_sum(self, losses: Tensor) -> Tensor:
        """Further losses of tokens or pairs that :meth:`step_mean` has counted: their sum."""
        total = losses.sum()
        self._loss_sum = self._loss_sum + total.detach()
        return total

    def on_before_backward(self, loss: Tensor) -> None:
        """Let the gradients of a step add up as they are, under DeepSpeed; a subclass's own calls this one."""
        unscale_losses(self.trainer.strategy)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the gradient of Lightning's scaled sum into that of the mean, and stop on a non-finite loss."""
        if not ends_step(self.trainer.strategy):
            return
        reshard(self)  # gathered weights would be those of before the step
        window = torch.stack(
            [
                torch.as_tensor(x, dtype=torch.float64, device=self.device)
                for x in (self._counted, self._loss_sum)
            ]
        )
        if dist.is_initialized() and self.trainer.world_size > 1:
            dist.all_reduce(window)
        counted, loss_sum = window.tolist()  # the one host synchronisation of a step
        if not torch.isfinite(window[1]):
            self._stop_on_non_finite(loss_sum)
        self._counted, self._loss_sum, self._rows, self._stepped = 0, 0.0, [], True
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(counted, 1)
        scale_gradients(self.trainer.strategy, optimizer, scale)
        self.end_step()

    def end_step(self) -> None:
        """What an algorithm does when all micro-batches of a step are over."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As in Lightning, and by norm under FSDP1 as well."""
        if self._fsdp1 is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            clip_shards([p for g in optimizer.param_groups for p in g["params"]], gradient_clip_val)

    def _stop_on_non_finite(self, loss: float) -> NoReturn:
        checkpoints = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        saved = [path for c in checkpoints for path in (c.last_model_path, c.best_model_path) if path]
        last = f"the last checkpoint is {saved[0]}" if saved else "no checkpoint was saved yet"
        raise NonFiniteLossError(
            f"the loss is {loss} at step {self.global_step}, on rows {self._rows} of the training data; no weight was "
            f"changed by this step, and {last}. Lower optimization.lr, look at these rows with `lightning-rlhf "
            f"doctor`, or {self.clip_remedy}"
        )

    def losses(self, batch: PackedBatch, stage: str) -> Tensor:
        """One loss per token or pair of a batch, its metrics recorded under a stage."""
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add a batch to the validation means."""
        self.losses(batch, "val")

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add a batch to the test means."""
        self.losses(batch, "test")

    # --- metrics --------------------------------------------------------------------------------------------------

    def new_metric(self, name: str) -> Metric:
        """What accumulates the values recorded under a name."""
        return Mean()

    def record(
        self, stage: str, batch: PackedBatch, values: Mapping[str, Tensor | tuple[Tensor, ...]]
    ) -> None:
        """Record values of a batch, and count its tokens in training."""
        self.record_values(stage, values)
        if stage == "train":
            self.num_tokens.update(batch.input_ids.numel())

    def record_values(self, stage: str, values: Mapping[str, Tensor | tuple[Tensor, ...]]) -> None:
        """Add values to the metrics of a stage (a tuple as several arguments); nothing is synchronised here."""
        for name, value in values.items():
            self._metric(stage, name).update(*(value if isinstance(value, tuple) else (value,)))

    def _metric(self, stage: str, name: str) -> Metric:
        return cast(Metric, self.metrics[metric_key(stage, name)])

    def on_train_batch_end(self, outputs: Any, batch: PackedBatch, batch_idx: int) -> None:  # noqa: ANN401
        """Log the means since the last log, every ``log_every_n_steps`` optimizer steps."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._stepped and every and self.global_step % every == 0:
            self._log_means("train")
        self._stepped = False

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation data."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over the test data."""
        self._log_means("test")

    def derived_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics that follow from the means of a stage, such as a perplexity."""
        return {}

    def _log_means(self, stage: str) -> dict[str, Tensor]:
        means = {name: self._metric(stage, name) for name in self.metric_names}
        values = {name: metric.compute().float() for name, metric in means.items() if metric.update_called}
        for metric in means.values():
            metric.reset()
        values |= self.derived_metrics(values)
        if stage == "train":
            values["num_tokens"] = self.num_tokens.compute()
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "rewards/accuracies"), batch_size=1)
        return values


def metric_key(stage: str, name: str) -> str:
    """The name of a metric as a submodule, where slashes are not allowed.

    Example:
        >>> metric_key("val", "rewards/margins")
        'val_rewards_margins'
    """
    return f"{stage}_{name}".replace("/", "_")


def as_policy(
    policy: "Policy | str | Mapping[str, Any] | nn.Module | None",
) -> tuple[Policy | None, nn.Module | None]:
    """Settings of a policy, or the built model: exactly one of the two."""
    if isinstance(policy, nn.Module):
        return None, policy
    if isinstance(policy, Policy | str | Mapping):
        return Policy.from_config(policy), None
    if policy is None:
        raise TypeError(
            "policy is None: a checkpoint of a run with a built model does not say where that came from; pass it "
            "again, load_from_checkpoint(…, policy=…, tokenizer=…)"
        )
    raise TypeError(f"policy must be a path, Policy settings or a built model, got {type(policy).__name__}")


def as_language_model(model: nn.Module) -> LanguageModel:
    """A built model as a :class:`LanguageModel`."""
    if isinstance(model, LanguageModel):
        return model
    if isinstance(model, PreTrainedModel | PeftModel):
        # `from_pretrained` hands models out in eval mode, where dropout and checkpointing would stay off in training.
        return LanguageModel(model.train())
    raise TypeError(f"policy must be a Transformers or PEFT model, got {type(model).__name__}")


def plain(settings: Any) -> Any:  # noqa: ANN401 - any settings class
    """Settings as plain values, which a checkpoint can hold under ``weights_only``; None for a built model."""
    if isinstance(settings, nn.Module):
        return None
    return asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
