"""Several LoRA adapters on one base. What requires a gradient never changes after they are made."""

import copy

from peft import PeftConfig, PeftModel

from lightning_rlhf.models.loading import POLICY_ADAPTER


def add_adapter(model: PeftModel, name: str, config: PeftConfig, *, trainable: bool) -> None:
    """Put a fresh adapter beside those that a model has.

    PEFT freezes every adapter that is not active; here only the new one's parameters are set, so that a strategy
    sees from the start what will be trained.

    Args:
        model: Changed in place.
        name: Of the new adapter.
        config: Its settings.
        trainable: Whether it requires gradients.
    """
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_adapter(name, copy.deepcopy(config))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(parameter_name, trainable and f".{name}." in parameter_name))


def copy_adapter(model: PeftModel, name: str, *, source: str = POLICY_ADAPTER, trainable: bool) -> None:
    """Put a copy of an adapter beside it.

    Args:
        model: Changed in place.
        name: Of the copy.
        source: What is copied, settings and weights.
        trainable: Whether the copy requires gradients.
    """
    add_adapter(model, name, model.peft_config[source], trainable=trainable)
    parameters = dict(model.named_parameters())
    for parameter_name, parameter in parameters.items():
        if f".{name}." in parameter_name:
            parameter.data = parameters[parameter_name.replace(f".{name}.", f".{source}.")].data.clone()


def is_fresh(model: PeftModel) -> bool:
    """Whether the policy's adapter is as it was made: B = 0, so that the model computes what its base does."""
    ups = [p for n, p in model.named_parameters() if f".lora_B.{POLICY_ADAPTER}" in n]
    return all(not bool(p.any()) for p in ups)


def member_adapter(index: int) -> str:
    """The name of the adapter of an ensemble's member.

    Example:
        >>> member_adapter(0), member_adapter(2)
        ('default', 'member_2')
    """
    return POLICY_ADAPTER if index == 0 else f"member_{index}"
