"""Models as rewards: a reward model, on a base of its own or the policy's, and the reward that a DPO policy implies."""

import re
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import functional as RF
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models import (
    LanguageModel,
    Policy,
    Scorer,
    load_language_model,
    load_scorer,
    load_tokenizer,
)
from lightning_rlhf.models.language_model import disable_dropout
from lightning_rlhf.models.loading import adapter_config, base_path
from lightning_rlhf.models.reward_directory import add_scorer
from lightning_rlhf.models.sharding import gathered
from lightning_rlhf.rewards.base import Reward
from lightning_rlhf.rewards.encoding import SampleEncoder
from lightning_rlhf.rewards.samples import Samples


class ModelReward(Reward):
    """Base of the rewards that a language model computes, in packed groups that share their prompt.

    Args:
        tokenizer: The model's own. Where the policy samples with another one, text is tokenised anew.
        batch_size: Completions at a time.
        name: What its values are logged under.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, batch_size: int, name: str | None) -> None:
        super().__init__(name)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.encoder = SampleEncoder(tokenizer)

    @property
    def language_model(self) -> LanguageModel:
        """What computes."""
        raise NotImplementedError(f"{type(self).__name__} names no model")

    def values(self, batch: PackedBatch) -> Tensor:
        """One reward per completion of a batch, ``(n,)``."""
        raise NotImplementedError(f"{type(self).__name__} has no values")

    def on_attach(self, policy: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take sampled ids as they are where they are of this model's tokenizer."""
        self.encoder.follow(tokenizer)

    def forward(self, samples: Samples) -> Tensor:
        """One reward per sample, ``(N,)``."""
        model = self.language_model
        device = next(model.parameters()).device
        rewards = torch.empty(len(samples))
        with gathered(model):  # which may be the policy's base, and other ranks have other batches
            for places, batch in self.encoder.batches(samples, self.batch_size):
                _require_room(batch, model)
                rewards[places] = self.values(batch.to(device)).float().cpu()
        return rewards


class RewardModelReward(ModelReward):
    """The normalised score of a reward model, read at a completion's last token.

    Args:
        model: A directory or Hub id, with or without settings, as :func:`~lightning_rlhf.models.load_scorer` takes
            it; or a built scorer. Without settings its weights are float32: give a ``dtype`` to a large one.
        tokenizer: Needed with a built scorer; else the reward model's own.
        batch_size: Completions at a time.
        share_base: The path is of an adapter that was trained on the policy's base: load nothing but the adapter, and
            score on the policy's own base once :meth:`attach` has said which it is.
        name: What its values are logged under.
    """

    def __init__(
        self,
        model: Policy | str | Scorer,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 32,
        share_base: bool = False,
        name: str = "reward_model",
    ) -> None:
        built = model if isinstance(model, Scorer) else None
        if built is not None and (tokenizer is None or share_base):
            raise ValueError(
                "a built scorer needs its tokenizer, and shares a base already where it should: pass "
                "tokenizer=… and no share_base"
            )
        settings = None if isinstance(model, Scorer) else Policy.from_config(model)
        if tokenizer is None:
            tokenizer = _own_tokenizer(cast(Policy, settings))
        super().__init__(tokenizer, batch_size, name)
        self._shared_path = settings.path if settings is not None and share_base else None
        self._scorer: tuple[Scorer, ...] = ()
        if not share_base:
            self._keep(built if built is not None else load_scorer(cast(Policy, settings)))

    def _keep(self, scorer: Scorer) -> None:
        self._scorer = (scorer,)
        self.hold(scorer)

    @property
    def scorer(self) -> Scorer:
        """The reward model.

        Raises:
            ValueError: If it shares a policy's base and was not told which.
        """
        if not self._scorer:
            raise ValueError(
                f"share_base: the reward model {self._shared_path!r} needs the policy whose base it shares: call "
                "attach(policy, tokenizer) first, as algorithms do"
            )
        return self._scorer[0]

    @property
    def language_model(self) -> LanguageModel:
        """The model under the score head."""
        return self.scorer.language_model

    def values(self, batch: PackedBatch) -> Tensor:
        """Normalised scores, ``(n,)``."""
        scores: Tensor = self.scorer(batch)
        return scores

    def on_attach(self, policy: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load the adapter beside the policy's, where the base is shared."""
        super().on_attach(policy, tokenizer)
        if self._shared_path is None or self._scorer:
            return
        adapter = free_adapter(policy, "reward_" + re.sub(r"\W", "_", self.name))
        scorer = add_scorer(policy, self._shared_path, adapter)
        for name, module in policy.named_modules():
            if name.endswith(f"lora_dropout.{adapter}"):
                disable_dropout(module)
        self._keep(scorer.to(next(policy.parameters()).device))


class ImplicitReward(ModelReward):
    r"""The reward that a policy trained by DPO implies, $\beta (\log \pi(y|x) - \log \pi_{ref}(y|x))$.

    See :func:`lightning_rlhf.functional.implicit_rewards`.

    Args:
        policy: The trained policy: a model or an adapter, by path or settings.
        reference: What it was trained from. Where that is the base of the policy's adapter, one model is loaded.
        beta: The β that it was trained with, in reward per nat.
        batch_size: Completions at a time.
        name: What its values are logged under.
    """

    def __init__(
        self,
        policy: Policy | str,
        reference: Policy | str,
        beta: float = 0.1,
        batch_size: int = 32,
        name: str = "implicit_reward",
    ) -> None:
        if beta <= 0:
            raise ValueError(f"beta must be positive, got {beta}")
        settings, reference = Policy.from_config(policy), Policy.from_config(reference)
        super().__init__(_own_tokenizer(settings), batch_size, name)
        self.beta = beta
        self._models: tuple[LanguageModel, ...] = (load_language_model(settings),)
        if not (adapter_config(settings.path) and same_place(base_path(settings.path), reference.path)):
            self._models = (*self._models, load_language_model(reference))
        for model in self._models:
            disable_dropout(model)
            self.hold(model)

    @property
    def language_model(self) -> LanguageModel:
        """The policy."""
        return self._models[0]

    def values(self, batch: PackedBatch) -> Tensor:
        """Implicit rewards, ``(n,)``."""
        reference = self._models[-1]
        logps = _logps(self._models[0], batch)
        with reference.role(None) if len(self._models) == 1 else nullcontext():
            return RF.implicit_rewards(logps, _logps(reference, batch), beta=self.beta)


def free_adapter(policy: LanguageModel, name: str) -> str:
    """A name for one more adapter of a policy: the wanted one, or with a number behind it."""
    taken = policy.model.peft_config if isinstance(policy.model, PeftModel) else {}
    tries = (name if n == 1 else f"{name}_{n}" for n in count(1))
    return next(candidate for candidate in tries if candidate not in taken)


def _logps(model: LanguageModel, batch: PackedBatch) -> Tensor:
    return RF.sum_by_sequence(model(batch).logprobs, batch.target_lengths)


def _own_tokenizer(settings: Policy) -> PreTrainedTokenizerBase:
    return load_tokenizer(settings.path, trust_remote_code=settings.trust_remote_code)


def same_place(one: str, other: str) -> bool:
    """Whether two paths or Hub ids name the same model.

    Example:
        >>> same_place("a/model", "a/model"), same_place("a/model", "b/model")
        (True, False)
    """
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def _require_room(batch: PackedBatch, model: LanguageModel) -> None:
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and batch.max_positions > room:
        raise ValueError(
            f"prompt and completion have up to {batch.max_positions} tokens, and the model that scores them was made "
            f"for {room}: sample less (max_new_tokens), leave long prompts out, or use another reward model"
        )
