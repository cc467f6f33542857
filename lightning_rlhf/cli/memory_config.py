"""From a configuration as it was parsed to what its memory depends on; nothing is built."""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_rlhf.algorithms import DPO, KTO, PPO, SFT, OnlineDPO, RewardModel
from lightning_rlhf.algorithms.estimators import GAE, Estimator
from lightning_rlhf.algorithms.footprint import RewardRole, Training
from lightning_rlhf.algorithms.footprint.settings import AlgorithmName
from lightning_rlhf.generation import HFGenerator, Sampling
from lightning_rlhf.models import Policy
from lightning_rlhf.objectives import Objective, Sigmoid
from lightning_rlhf.rewards.scorers import ImplicitReward, RewardModelReward

Config = Mapping[str, Any]
ALGORITHMS: dict[AlgorithmName, type] = {
    "SFT": SFT,
    "DPO": DPO,
    "KTO": KTO,
    "RewardModel": RewardModel,
    "PPO": PPO,
    "OnlineDPO": OnlineDPO,
}
PRECISIONS = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
DEFAULT_LENGTH, PAIR = 1024, 2


@dataclass(frozen=True)
class Sizes:
    """What a configuration leaves open, because it is in the data; None for what is most that it allows.

    Attributes:
        prompt_tokens: Tokens of a prompt.
        completion_tokens: Tokens of a completion.
        completions: Of a prompt, of rankings for a reward model.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completions: int | None = None


def training_of(config: Config, sizes: Sizes) -> Training:
    """What the memory of a configured training depends on.

    Args:
        config: With ``model``, ``data`` and ``trainer``, as plain values.
        sizes: Of the rows.

    Returns:
        See :class:`~lightning_rlhf.algorithms.footprint.Training`.

    Raises:
        ValueError: If the module or datamodule is none of this package's, or does not say its batch size.
    """
    algorithm = _algorithm(config["model"])
    model, data = arguments(config["model"]), prompts_of(config["data"])
    if "batch_size" not in data:
        raise ValueError(
            f"{config['data']['class_path']} has no batch_size: how large a batch is has to be known; use one of this "
            "package's datamodules, or a subclass"
        )
    sampling = Sampling(
        **(model.get("sampling") or ({"num_samples": PAIR} if algorithm == "OnlineDPO" else {}))
    )
    prompt, completion = _lengths(data, sizes, sampling if algorithm in ("PPO", "OnlineDPO") else None)
    completions, learned = _completions(algorithm, data, sizes)
    groups = data["batch_size"]
    if data.get("max_tokens") is not None:
        groups = max(1, data["max_tokens"] // (prompt + completions * completion))
    update = model.get("update") or {}
    precision = str(config["trainer"].get("precision"))
    return Training(
        algorithm=algorithm,
        policy=_policy(config),
        precision=PRECISIONS.get(precision, precision),
        optimizer=(model.get("optimization") or {}).get("name", "adamw"),
        groups=groups,
        prompt=prompt,
        completion=completion,
        completions=completions,
        accumulates=config["trainer"].get("accumulate_grad_batches", 1) > 1,
        has_reference=_has_reference(algorithm, model),
        reference=None if model.get("reference") is None else Policy.from_config(model["reference"]),
        reference_follows=model.get("reference_update_steps") is not None,
        learned=learned,
        with_collision=bool(model.get("wpo")),
        members=model.get("num_members", 1),
        has_critic=algorithm == "PPO" and _estimator(model).needs_values,
        critic=model.get("critic"),
        rewards=tuple(_reward_roles(model.get("reward"))),
        sampling=sampling,
        generates=_generates(model.get("generator")),
        minibatch=update.get("minibatch_size", 16),
        micro_batch=update.get("micro_batch_size"),
        micro_tokens=update.get("micro_batch_tokens"),
    )


def arguments(config: Config) -> dict[str, Any]:
    """The arguments of a configured class."""
    return dict(config.get("init_args") or {})


def prompts_of(data: Config) -> dict[str, Any]:
    """The arguments of a datamodule; of the two of PPO-ptx, the one with prompts."""
    found = arguments(data)
    return arguments(found["prompts"]) if "prompts" in found else found


def class_of(config: Config, home: str = "lightning_rlhf") -> type:
    """The class that a configuration names."""
    module, _, name = config["class_path"].rpartition(".")
    found: type = getattr(importlib.import_module(module or home), name)
    return found


def _policy(config: Config) -> Policy:
    """What is trained; on a CPU there is nowhere else to hold activations."""
    policy = Policy.from_config(arguments(config["model"])["policy"])
    on_cpu = config["trainer"].get("accelerator") == "cpu"
    return replace(policy, offload_activations=False) if on_cpu else policy


def _algorithm(model: Config) -> AlgorithmName:
    cls = class_of(model)
    for name, base in ALGORITHMS.items():
        if issubclass(cls, base):
            return name
    raise ValueError(
        f"memory knows {', '.join(ALGORITHMS)} and subclasses of them, not {model['class_path']}"
    )


def _lengths(data: Config, sizes: Sizes, sampling: Sampling | None) -> tuple[int, int]:
    """Tokens of a prompt and of a completion: all that ``max_length`` allows, half of it a prompt's."""
    longest = data.get("max_length") or DEFAULT_LENGTH
    completion = sizes.completion_tokens
    if sampling is not None:
        completion = completion or sampling.max_new_tokens
        longest = max(longest, completion + 1)
    prompt = sizes.prompt_tokens or data.get("max_prompt_length") or longest // 2
    if completion is not None and sizes.prompt_tokens is None:
        prompt = min(prompt, longest - completion)
    return max(1, prompt), completion or max(1, longest - prompt)


def _completions(algorithm: AlgorithmName, data: Config, sizes: Sizes) -> tuple[int, int | None]:
    """Completions of a prompt, and how many of them are learnt from where that is not all."""
    if algorithm == "KTO":
        return (PAIR, 1) if data.get("mismatched", True) else (1, None)
    if algorithm == "RewardModel":
        return sizes.completions or PAIR, None
    return (PAIR if algorithm == "DPO" else 1), None


def _has_reference(algorithm: AlgorithmName, model: Config) -> bool:
    if algorithm in ("SFT", "RewardModel") or model.get("precompute_reference"):
        return False
    if algorithm != "DPO":
        return True
    objective = model.get("objective")
    return (Sigmoid() if objective is None else Objective.from_config(objective)).needs_reference


def _estimator(model: Config) -> Estimator:
    config = model.get("estimator")
    return GAE() if config is None else Estimator.from_config(config)


def _generates(generator: Config | None) -> bool:
    return generator is None or issubclass(class_of(generator, "lightning_rlhf.generation"), HFGenerator)


def _reward_roles(reward: Any) -> Iterator[RewardRole]:  # noqa: ANN401 - rewards are made of rewards
    """The models in a reward, however deep."""
    if isinstance(reward, Mapping) and "class_path" in reward:
        cls, given = class_of(reward, "lightning_rlhf.rewards"), arguments(reward)
        size = given.get("batch_size", 32)
        if issubclass(cls, RewardModelReward):
            yield RewardRole(Policy.from_config(given["model"]), size, bool(given.get("share_base")))
            return
        if issubclass(cls, ImplicitReward):
            both = (Policy.from_config(given[name]) for name in ("policy", "reference"))
            yield from (RewardRole(policy, size, by_logprobs=True) for policy in both)
            return
        members = given.get("members") or []
        yield from (RewardRole(Policy(member)) for member in members if isinstance(member, str))
        yield from _reward_roles(given)
    elif isinstance(reward, Mapping):
        for value in reward.values():
            yield from _reward_roles(value)
    elif isinstance(reward, list):
        for value in reward:
            yield from _reward_roles(value)
