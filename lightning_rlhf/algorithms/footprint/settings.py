"""What a training's memory depends on, and what was found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_rlhf.generation import Sampling
from lightning_rlhf.models import Policy
from lightning_rlhf.models.critic import CriticKind
from lightning_rlhf.models.memory import HOST, Peak

AlgorithmName = Literal["SFT", "DPO", "KTO", "RewardModel", "PPO", "OnlineDPO"]


@dataclass(frozen=True)
class RewardRole:
    """A model that scores samples.

    Attributes:
        policy: The model, or with ``share_base`` its adapter.
        batch_size: Completions at a time.
        share_base: Whether it is an adapter on the policy's base.
        by_logprobs: Whether it scores by log-probabilities, and so projects to the vocabulary, instead of by a head.
    """

    policy: Policy
    batch_size: int = 32
    share_base: bool = False
    by_logprobs: bool = False


@dataclass(frozen=True)
class Training:
    """A training, as far as its memory depends on it. Every row is as long as ``prompt`` and ``completion`` say.

    Attributes:
        algorithm: Name of its class.
        policy: What is trained.
        precision: Of the Trainer.
        optimizer: Its name in :class:`~lightning_rlhf.Optimization`.
        groups: Prompts in a batch, on each rank.
        prompt: Tokens of a prompt.
        completion: Tokens of a completion.
        completions: Of a prompt, where they are not sampled.
        accumulates: Whether gradients of several batches are added up.
        has_reference: Whether a reference is computed during training.
        reference: Another model as the reference.
        reference_follows: Whether the reference has to become the policy.
        learned: Of a prompt's completions, how many are learnt from; None for all.
        with_collision: Whether collision probabilities are computed as well (WPO).
        members: Of a reward model's ensemble.
        has_critic: Whether there is one.
        critic: Its kind.
        rewards: Models that score samples.
        sampling: How completions are drawn.
        generates: Whether the policy's own model draws them; else another engine does, with memory of its own.
        minibatch: Of PPO: completions an optimizer step.
        micro_batch: Of PPO: completions a forward at most.
        micro_tokens: Of PPO: tokens a forward at most.
    """

    algorithm: AlgorithmName
    policy: Policy
    precision: str = "32-true"
    optimizer: str = "adamw"
    groups: int = 8
    prompt: int = 512
    completion: int = 512
    completions: int = 1
    accumulates: bool = False
    has_reference: bool = False
    reference: Policy | None = None
    reference_follows: bool = False
    learned: int | None = None
    with_collision: bool = False
    members: int = 1
    has_critic: bool = False
    critic: CriticKind | None = None
    rewards: tuple[RewardRole, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    generates: bool = True
    minibatch: int = 16
    micro_batch: int | None = None
    micro_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse what has no size."""
        for name in ("groups", "prompt", "completion", "completions", "members", "minibatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def samples(self) -> bool:
        """Whether completions are sampled."""
        return self.algorithm in ("PPO", "OnlineDPO")

    @property
    def completions_a_forward(self) -> int:
        """Of PPO: completions in a forward that is learned from.

        Example:
            >>> Training("PPO", Policy("x"), prompt=30, completion=20, micro_tokens=120).completions_a_forward
            2
        """
        room = self.minibatch
        if self.micro_tokens is not None:
            room = max(1, self.micro_tokens // (self.prompt + self.completion))
        return min(self.minibatch, self.micro_batch or self.minibatch, room)


@dataclass(frozen=True)
class Phase:
    """A part of a training step.

    Attributes:
        name: What happens.
        peak: The most bytes that are alive in it.
    """

    name: str
    peak: Peak


@dataclass(frozen=True)
class Forecast:
    """What a training will take.

    Attributes:
        phases: In their order.
        paged: Bytes of the optimizer in paged memory, which leaves the device where that is full.
        trainable: Parameters that are trained.
    """

    phases: tuple[Phase, ...]
    paged: int
    trainable: int

    @property
    def worst(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak.total)

    @property
    def offloaded(self) -> int:
        """The most bytes of activations in the host's memory."""
        return max(phase.peak.most.get(HOST, 0) for phase in self.phases)

    @property
    def total(self) -> int:
        """Bytes of the highest peak, paged memory apart."""
        return self.worst.peak.total

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes at the highest peak, by what they are for."""
        return self.worst.peak.parts
