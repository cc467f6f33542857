"""The phases of a training step, computed without data."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lightning_rlhf.algorithms.footprint.roles import Roles, build
from lightning_rlhf.algorithms.footprint.settings import Forecast, Phase, Training
from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from lightning_rlhf.functional import compare_logprobs
from lightning_rlhf.generation.prefill import SPARE, SpareLayer, sampling_cache
from lightning_rlhf.models.memory import GRADIENTS
from lightning_rlhf.models.modes import in_eval_mode

KV_CACHE = "KV cache"
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def forecast(training: Training) -> Forecast:
    """What a training will take in memory, found by computing its phases without data.

    Args:
        training: See :class:`Training`. Only configurations are read from the paths in it.

    Returns:
        The phases with their peaks. They hold what PyTorch asks its allocator for: not what the allocator keeps
        besides, nor a GPU's context.

    Raises:
        FileNotFoundError: If there is no model's configuration at a path.
        ValueError: If the settings contradict each other.
        NotImplementedError: If the model does something that depends on data.
    """
    step = Step(training, build(training))
    phases = tuple(step.measure(name, compute) for name, compute in step.phases())
    return Forecast(phases, step.roles.paged, sum(step.roles.trainable))


class Step:
    """One training step, phase by phase.

    Args:
        training: What is trained.
        roles: The models.
    """

    def __init__(self, training: Training, roles: Roles) -> None:
        self.training, self.roles = training, roles

    def phases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Name and computation of each phase, in order."""
        training = self.training
        if training.samples:
            if training.generates:
                yield "generation", self.generate
            if self.roles.rewards:
                yield "scoring", self.score
            yield "policy and reference", self.compare
        elif self.roles.reference is not None:
            yield "reference", self.refer
        yield "forward and backward", self.learn

    def measure(self, name: str, compute: Callable[[], None]) -> Phase:
        """Compute a phase, and say what it takes."""
        ledger = self.roles.ledger
        # Where optimisation is automatic, the last step's gradients are there until the next backward.
        if self.training.algorithm != "PPO":
            self._hold_gradients()
        ledger.reset_peak()
        try:
            with ledger.fake():
                compute()
        except RuntimeError as error:  # also what asks for data: a choice of experts, a length
            model = type(self.roles.policy.causal_lm).__name__
            raise NotImplementedError(
                f"{model} in {self.training.precision} cannot be computed without data ({name}: {error}): what it "
                "takes is not predicted"
            ) from error
        return Phase(name, ledger.peak)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.training.precision)
        # As Lightning's plugin has it: what is cast is not kept for the next use.
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype, cache_enabled=False)

    def _trained(self) -> list[Tensor]:
        found = {id(p): p for m in self.roles.modules().values() for p in m.parameters() if p.requires_grad}
        return list(found.values())

    def _hold_gradients(self) -> None:
        with self.roles.ledger.fake():
            for parameter in self._trained():
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                    self.roles.ledger.mark([parameter.grad], GRADIENTS)

    def _batch(self, groups: int, completions: int) -> PackedBatch:
        training = self.training
        group = PromptGroup([0] * training.prompt, [[0] * training.completion] * completions)
        return self.roles.ledger.without_data(pack([group] * groups))

    # --- phases ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refer(self) -> None:
        """The reference's log-probabilities of a batch."""
        assert self.roles.reference is not None
        with self._autocast(), self.roles.as_reference():
            self.roles.reference(self._batch(self.training.groups, self.training.completions))

    def learn(self) -> None:
        """Forward and backward of a batch, as often as gradients are kept from one to the next."""
        training = self.training
        if training.algorithm == "PPO":
            size = training.completions_a_forward
            batch = self._batch(size, 1)
            if training.minibatch > size:
                self._hold_gradients()
        else:
            completions = 2 if training.algorithm == "OnlineDPO" else training.completions
            batch = self._batch(training.groups, completions)
        with self._autocast():
            loss = self.loss(batch)
        if not training.accumulates and training.algorithm != "PPO":
            for parameter in self._trained():
                parameter.grad = None
        loss.backward()
        critic = self.roles.critic
        if critic is not None and critic.kind != "head":  # it has a backward of its own
            with self._autocast():
                loss = critic(batch, loss).sum()  # of its own model: the policy's hidden states are not read
            loss.backward()
        for parameter in self._trained():
            parameter.grad = None

    def loss(self, batch: PackedBatch) -> Tensor:
        """A sum over what the algorithm's loss is made of."""
        training, policy = self.training, self.roles.policy
        if self.roles.members:
            return torch.stack([member.raw(batch) for member in self.roles.members]).sum()
        if training.algorithm == "PPO":
            hidden = policy.hidden_states(batch)
            loss = policy.of_hidden(hidden, batch.targets).logprobs.sum()
            critic = self.roles.critic
            if critic is None or critic.kind != "head":
                return loss
            return loss + critic(batch, hidden).sum()
        found = policy(
            batch, with_entropy=True, with_collision=training.with_collision, learned=training.learned
        )
        total: Tensor = found.logprobs.sum()
        return total

    @torch.no_grad()
    def compare(self) -> None:
        """What policy, reference and critic say of samples before anything is learned."""
        training, roles = self.training, self.roles
        each = training.sampling.num_samples
        if training.algorithm == "PPO":
            groups = max(1, training.completions_a_forward // each)
        else:
            groups = max(1, training.sampling.batch_size // each)
        batch = self._batch(min(groups, training.groups), each)
        with self._autocast():
            hidden = roles.policy.hidden_states(batch)
            assert roles.reference is not None
            with roles.as_reference():
                ref_hidden = roles.reference.hidden_states(batch)
            heads = (roles.policy.logits, roles.reference.logits)
            chunk = roles.policy.chunk_size
            compare_logprobs(hidden, heads[0], ref_hidden, heads[1], batch.targets, chunk_size=chunk)
            if roles.critic is not None:
                roles.critic(batch, hidden)

    @torch.no_grad()
    def score(self) -> None:
        """Scores of samples by every model that gives them, one after the other."""
        each = self.training.sampling.num_samples
        for scorer, role in self.roles.rewards:
            groups = min(max(1, role.batch_size // each), self.training.groups)
            model = scorer.language_model if role.by_logprobs else scorer
            with self._autocast():
                model(self._batch(groups, each))

    @torch.no_grad()
    def generate(self) -> None:
        """The prompts' keys and values, and the last step of a batch of samples that are as long as they may be."""
        training, policy = self.training, self.roles.policy
        prompts, each = min(training.groups, training.sampling.batch_size), training.sampling.num_samples
        with in_eval_mode(policy), self._autocast():
            cache = self._prefill(prompts, each)
            self.roles.ledger.mark(_tensors(cache), KV_CACHE)
            # Nothing follows the last token, so its keys and values are never computed.
            width = training.prompt + training.completion - 1
            # Whenever its memory grows, by so many tokens, what is kept is there twice, layer by layer.
            for length in (width - SPARE, width - 1):
                _grow(cache, length)
                self.roles.ledger.mark(_tensors(cache), KV_CACHE)
            if training.completion > 1:
                self._decode(cache, torch.zeros(prompts * each, 1, dtype=torch.long), width)
                self.roles.ledger.mark(_tensors(cache), KV_CACHE)

    def _prefill(self, prompts: int, each: int) -> DynamicCache:
        ids = torch.zeros(prompts, self.training.prompt, dtype=torch.long)
        policy = self.roles.policy
        cache = sampling_cache(policy, ids, torch.ones_like(ids), each)
        if cache is None:
            cache = DynamicCache(config=policy.config)
        rest = ids.repeat_interleave(each, 0)[:, cache.get_seq_length() :]
        self._decode(cache, rest, ids.shape[1])
        return cache

    def _decode(self, cache: DynamicCache, ids: Tensor, width: int) -> None:
        mask = torch.ones(len(ids), width, dtype=torch.long)
        output = self.roles.policy.causal_lm(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        output.logits[:, -1].to(copy=True, dtype=torch.float32).softmax(-1)


def _grow(cache: DynamicCache, length: int) -> None:
    """Let a cache hold so many tokens."""
    for layer, keys, values in _entries(cache):
        missing = length - keys.shape[2]
        if missing > 0:  # by what takes no memory of its own
            layer.update(*(kept[:, :, :1].expand(-1, -1, missing, -1) for kept in (keys, values)))


def _tensors(cache: DynamicCache) -> list[Tensor]:
    return [tensor for _, *pair in _entries(cache) for tensor in pair]


def _entries(cache: DynamicCache) -> list[tuple[Any, Tensor, Tensor]]:
    """Layers that keep all keys and values, with theirs; one with a window keeps as many as it does anyway."""
    whole = (DynamicLayer, SpareLayer)
    layers = [x for x in cache.layers if isinstance(x, DynamicLayer) and type(x) in whole]
    return [(x, x.keys, x.values) for x in layers if x.keys is not None and x.values is not None]
