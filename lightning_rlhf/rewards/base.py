"""What a reward takes and gives, and the checked call that algorithms use."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models import LanguageModel
from lightning_rlhf.rewards.samples import Samples, shown


class RewardError(RuntimeError):
    """A reward raised, or what it returned is no reward; the message names it."""


@dataclass(frozen=True)
class RewardResult:
    """Rewards, and what they are made of.

    Attributes:
        total: One reward per sample, ``(N,)``, float32 on the CPU.
        parts: Values by the name that they are logged under, each ``(N,)``: see :attr:`Reward.part_names`.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Reward(nn.Module):
    """Base of all rewards: one number per sampled completion, the higher the better.

    A subclass writes ``forward``. It is a module so that an algorithm which has it as an attribute moves it to the
    device. A frozen model that it scores with is kept by :meth:`hold`.

    Args:
        name: What its values are logged under; by default the class's name, as in ``length_penalty``.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name or default_name(type(self))
        self._held: tuple[nn.Module, ...] = ()

    def forward(self, samples: Samples) -> Tensor | RewardResult:
        """One finite number per sample, ``(N,)``; call it by :func:`score`, which checks that."""
        raise NotImplementedError(
            f"{type(self).__name__} has no forward: it must return one reward per sample"
        )

    def start(self, samples: Samples) -> Callable[[], Tensor | RewardResult]:
        """Begin to score, and return what waits for the result. Here nothing begins before it is waited for."""
        return partial(self, samples)

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names in the ``parts`` of every result."""
        return (self.name,)

    def attach(self, policy: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tell a reward, and those that it is made of, what samples.

        Algorithms call it once, when the policy is loaded and before a strategy wraps it.

        Args:
            policy: What is trained; a reward adapter may share its base.
            tokenizer: What the token ids of all samples are of.
        """
        for module in self.modules():
            if isinstance(module, Reward):
                module.on_attach(policy, tokenizer)

    def on_attach(self, policy: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """What this reward does with the policy and its tokenizer; nothing unless a subclass says so."""

    def hold(self, model: nn.Module) -> None:
        """Keep a frozen model to score with.

        It moves with this module and stays in eval mode, but is none of its parts: no optimizer, gradient
        reduction or checkpoint sees its weights, which come from where they were loaded.
        """
        self._held = (*self._held, model.eval().requires_grad_(False))

    def held(self) -> list[tuple[str, nn.Module]]:
        """The frozen models of this reward and of those that it is made of, each with its reward's name."""
        return [(r.name, model) for r in self.modules() if isinstance(r, Reward) for model in r._held]

    def _apply(self, fn: Any, recurse: bool = True) -> "Reward":  # noqa: ANN401 - as in nn.Module
        for model in self._held:
            model._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


def default_name(cls: type) -> str:
    """The name of a class in logs.

    Example:
        >>> default_name(RewardResult)
        'reward_result'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()


def require_unique(names: Sequence[str]) -> None:
    """Refuse two parts of one name: one would hide the other in the logs.

    Raises:
        ValueError: If there are.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several rewards would be logged as {twice[0]!r}: give one of them another name")


def score(reward: Reward, samples: Samples) -> RewardResult:
    """Rewards of samples, checked, without gradients.

    Args:
        reward: What scores.
        samples: At least one.

    Returns:
        Total and parts, each ``(N,)``, float32, on the CPU.

    Raises:
        RewardError: If the reward raises, returns another number of values than there are samples, or a value that
            is not finite. It names reward and sample, and what was raised is its cause.

    Example:
        >>> class Shortness(Reward):
        ...     def forward(self, samples: Samples) -> Tensor:
        ...         return -samples.lengths
        >>> score(Shortness(), Samples(["Hi"], ["Yo"], [[5]], [[6, 2]], [False])).parts
        {'shortness': tensor([-2.])}
    """
    return begin(reward, samples)()


def begin(reward: Reward, samples: Samples) -> Callable[[], RewardResult]:
    """Like :func:`score`, but in two steps, so that several rewards can be waited for together.

    Args:
        reward: What scores.
        samples: At least one.

    Returns:
        A function that waits for the result and checks it.

    Raises:
        RewardError: Both as it begins and later; see :func:`score`.
    """
    wait = _guarded(reward, partial(reward.start, samples))

    def finish() -> RewardResult:
        found = _guarded(reward, wait)
        if not isinstance(found, RewardResult):
            found = RewardResult(found, {reward.name: found})
        parts = {name: _checked(values, name, samples) for name, values in found.parts.items()}
        return RewardResult(_checked(found.total, reward.name, samples), parts)

    return finish


@torch.no_grad()
def _guarded(reward: Reward, run: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever it returns
    try:
        return run()
    except RewardError:
        raise  # of a reward that this one is made of: it is named already
    except Exception as error:
        raise RewardError(f"the reward {reward.name!r} failed: {type(error).__name__}: {error}") from error


def _checked(values: Tensor, name: str, samples: Samples) -> Tensor:
    if not isinstance(values, Tensor):
        raise RewardError(f"the reward {name!r} returned a {type(values).__name__}, and must return a tensor")
    if values.shape != (len(samples),):
        raise RewardError(
            f"the reward {name!r} returned values of shape {tuple(values.shape)} for {len(samples)} samples: it must "
            f"return one per sample, ({len(samples)},)"
        )
    values = values.detach().to("cpu", torch.float32)
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        first = bad[0]
        raise RewardError(
            f"the reward {name!r} is {values[first].item()} for sample {first} ({len(bad)} of {len(samples)} are not "
            f"finite), whose prompt is {shown(samples.prompts[first])} and whose completion is "
            f"{shown(samples.completions[first])}"
        )
    return values
