"""Settings that make a training smaller, cheapest first, each tried by predicting again."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_rlhf.algorithms.footprint import Forecast, Training, forecast
from lightning_rlhf.cli.memory_config import Config, Sizes, prompts_of, training_of
from lightning_rlhf.models import LoRA
from lightning_rlhf.models.loading import adapter_config

WORTH = 0.98
"""A switch is left out where it leaves more than this share."""
SHORTEST = 256
CHECKPOINTING = "model.policy.gradient_checkpointing"


@dataclass(frozen=True)
class Switch:
    """A change of the configuration.

    Attributes:
        flags: Names of settings and their new values.
        costs: What is paid for it.
    """

    flags: Mapping[str, Any]
    costs: str

    def __str__(self) -> str:
        """As on the command line.

        Example:
            >>> str(Switch({"model.precompute_reference": True}, ""))
            '--model.precompute_reference true'
        """
        values = {True: "true", False: "false"}
        return " ".join(f"--{name} {values.get(value, value)}" for name, value in self.flags.items())


@dataclass(frozen=True)
class Suggestion:
    """A switch, and what a training takes with it and all before it."""

    switch: Switch
    found: Forecast


def suggestions(config: Config, sizes: Sizes, limit: int, found: Forecast) -> Iterator[Suggestion]:
    """Switches to turn one after the other until a training fits; those that hardly help are left out.

    Args:
        config: As it is.
        sizes: Of the rows.
        limit: Bytes that there are.
        found: What it takes now.

    Yields:
        Each switch with what it takes then; the last one fits, or nothing here makes it fit.
    """
    for kind in KINDS:
        while found.total > limit:
            switch = kind(config, training_of(config, sizes), found.worst.name)
            if switch is None:
                break
            changed = changed_by(config, switch.flags)
            lower = forecast(training_of(changed, sizes))
            if lower.total > WORTH * found.total:
                break
            config, found = changed, lower
            yield Suggestion(switch, found)


def changed_by(config: Config, flags: Mapping[str, Any]) -> Config:
    """A configuration with some settings changed, by their names on the command line.

    Example:
        >>> changed_by({"model": {"init_args": {"policy": "a/model"}}}, {"model.policy.lora.r": 8})
        {'model': {'init_args': {'policy': {'path': 'a/model', 'lora': {'r': 8}}}}}
    """
    changed = copy.deepcopy(dict(config))
    for flag, value in flags.items():
        section, *keys, last = flag.split(".")
        at: Any = changed[section]
        for key in keys:
            at = _arguments(at)
            if isinstance(at.get(key), str):
                at[key] = {"path": at[key]}
            at[key] = at.get(key) or {}
            at = at[key]
        _arguments(at)[last] = value
    return changed


def _arguments(config: Any) -> Any:  # noqa: ANN401 - a class with arguments, or the arguments
    return config.get("init_args", config)


# --- switches, cheapest first -------------------------------------------------------------------------------------


def _precompute(config: Config, training: Training, worst: str) -> Switch | None:
    own = training.reference is not None or not _trains_adapter(training)
    if training.algorithm not in ("DPO", "KTO") or not training.has_reference or not own:
        return None
    return Switch({"model.precompute_reference": True}, "one pass over the data before training")


def _smaller(config: Config, training: Training, worst: str) -> Switch | None:
    """Fewer rows at a time, in the phase that takes the most."""
    if training.samples and worst == "scoring":
        size = max((role.batch_size for role in training.rewards), default=1)
        single = "batch_size" in _arguments(config["model"]["init_args"]["reward"])
        return _halved("model.reward.batch_size", min(size, training.groups), "time") if single else None
    is_update = worst == "forward and backward"
    if worst == "generation" or (training.algorithm == "OnlineDPO" and not is_update):
        return _halved(
            "model.sampling.batch_size", min(training.sampling.batch_size, training.groups), "time"
        )
    if training.algorithm == "PPO":
        return _halved("model.update.micro_batch_size", training.completions_a_forward, "time; same result")
    data, trainer = prompts_of(config["data"]), config["trainer"]
    tokens = data.get("max_tokens")
    name = "batch_size" if tokens is None else "max_tokens"
    if training.groups < 2:
        return None
    switch = _halved(f"data.{name}", tokens or data["batch_size"], "time; same result")
    assert switch is not None
    accumulate = 2 * (trainer.get("accumulate_grad_batches") or 1)
    costs = "time, and noise of KTO's reference point" if training.algorithm == "KTO" else switch.costs
    return Switch({**switch.flags, "trainer.accumulate_grad_batches": accumulate}, costs)


def _halved(name: str, size: int, costs: str) -> Switch | None:
    return Switch({name: size // 2}, costs) if size > 1 else None


def _selective(config: Config, training: Training, worst: str) -> Switch | None:
    if training.policy.gradient_checkpointing:
        return None
    return Switch({CHECKPOINTING: "selective"}, "what is between the products a second time")


def _checkpointing(config: Config, training: Training, worst: str) -> Switch | None:
    if training.policy.gradient_checkpointing is True:
        return None
    return Switch({CHECKPOINTING: True}, "every layer's forward a second time")


def _offload(config: Config, training: Training, worst: str) -> Switch | None:
    policy = training.policy
    if policy.offload_activations or not policy.gradient_checkpointing:
        return None
    if config["trainer"].get("accelerator") == "cpu":
        return None
    return Switch({"model.policy.offload_activations": True}, "copies to the host and back")


def _optimizer(config: Config, training: Training, worst: str) -> Switch | None:
    if training.optimizer.endswith("8bit") or training.optimizer == "sgd":
        return None
    return Switch(
        {"model.optimization.name": "paged_adamw_8bit"}, "moments in 8 bits; paged where it must be"
    )


def _critic(config: Config, training: Training, worst: str) -> Switch | None:
    has_own = training.critic == "model" or (training.critic is None and not _trains_adapter(training))
    if not training.has_critic or not has_own:
        return None
    kind = "adapter" if _trains_adapter(training) else "head"
    return Switch(
        {"model.critic": kind}, "the critic shares the policy's base" + (", and trunk" * (kind == "head"))
    )


def _precision(config: Config, training: Training, worst: str) -> Switch | None:
    if training.precision != "32-true":
        return None
    name = "bf16-true" if _trains_adapter(training) else "bf16-mixed"
    return Switch({"trainer.precision": name}, "computed in bfloat16")


def _lora(config: Config, training: Training, worst: str) -> Switch | None:
    if _trains_adapter(training):
        return None
    return Switch(
        {"model.policy.lora.r": LoRA.r}, "an adapter is trained, not the weights; raise the learning rate"
    )


def _four_bits(config: Config, training: Training, worst: str) -> Switch | None:
    if training.policy.quantization is not None or not _trains_adapter(training):
        return None
    return Switch({"model.policy.quantization.bits": 4}, "a base in 4 bits")


def _shorter(config: Config, training: Training, worst: str) -> Switch | None:
    length = prompts_of(config["data"]).get("max_length")
    if length is None or length < 2 * SHORTEST or training.samples:
        return None
    prompt = prompts_of(config["data"]).get("max_prompt_length")
    flags = {"data.max_length": length // 2}
    if prompt is not None:
        flags["data.max_prompt_length"] = min(prompt, length // 4)
    return Switch(flags, "longer rows are cut")


def _trains_adapter(training: Training) -> bool:
    return training.policy.lora is not None or adapter_config(training.policy.path) is not None


KINDS: tuple[Callable[[Config, Training, str], Switch | None], ...] = (
    _precompute,
    _smaller,
    _selective,
    _checkpointing,
    _optimizer,
    _critic,
    _precision,
    _lora,
    _four_bits,
    _offload,
    _smaller,
    _shorter,
)
