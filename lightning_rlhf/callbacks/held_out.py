"""Held-out prompts, what a policy answers to them, and what two rewards say of the answers."""

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.algorithms.online import Online
from lightning_rlhf.algorithms.rollout import Rollout, Scored, prompt_seeds, sample_rollout
from lightning_rlhf.callbacks.held_out_kl import prompts_of
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.functional import sum_by_sequence
from lightning_rlhf.generation import Generator, Sampling
from lightning_rlhf.models import LanguageModel, Reference
from lightning_rlhf.models.modes import in_eval_mode
from lightning_rlhf.models.sharding import gathered
from lightning_rlhf.rewards import Normalized, Reward, Samples, score


def parts_of(
    module: L.LightningModule,
) -> tuple[LanguageModel, Reference, PreTrainedTokenizerBase]:
    """Policy, reference and tokenizer of a module.

    Raises:
        ValueError: If it lacks one.
    """
    policy, reference = getattr(module, "policy", None), getattr(module, "reference", None)
    tokenizer = getattr(module, "tokenizer", None)
    if not isinstance(policy, LanguageModel) or tokenizer is None:
        raise ValueError(
            f"a monitor samples module.policy with module.tokenizer, which {type(module).__name__} lacks"
        )
    if not isinstance(reference, Reference):
        raise ValueError(
            "a monitor compares with module.reference, and there is none: use an objective with a reference and "
            "precompute_reference: false, or leave the monitor out"
        )
    return policy, reference, tokenizer


def reward_of(module: L.LightningModule, part: str | None) -> Reward:
    """The reward that a module trains on, or the one within it that has this name.

    Raises:
        ValueError: If it has none, or none with such a part, or what is asked for does not compare along the run.
    """
    if not isinstance(module, Online):
        raise ValueError(
            f"{type(module).__name__} has no reward of its own: give GoodhartMonitor a reward as proxy"
        )
    within = {one.name: one for one in module.reward.modules() if isinstance(one, Reward)}
    names = [name for name in module.reward.part_names if name in within]
    moved = moving(module.reward)
    steady = ", ".join(name for name in names if name not in moved)
    if part is not None and part not in names:
        raise ValueError(
            f"proxy {part!r} is no part of the module's reward: give a reward, or one of {', '.join(names)}"
        )
    if moved and (part is None or part in moved):
        raise ValueError(
            f"{part or module.reward.name} is Normalized, which changes with what it has seen, so that evaluations do "
            f"not compare: give GoodhartMonitor another part as its proxy, one of {steady}"
        )
    return module.reward if part is None else within[part]


def moving(reward: Reward) -> set[str]:
    """The names of rewards within, itself included, that change with what was seen, or are made of one that does."""
    return {
        one.name
        for one in reward.modules()
        if isinstance(one, Reward) and any(isinstance(part, Normalized) for part in one.modules())
    }


def without_rest(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations but those of less than half as many prompts as another: what was left of the rollouts at the end.

    The start, which comes first, always stays.

    Example:
        >>> [len(one["gold"]) for one in without_rest([{"gold": [0.0] * n} for n in (9, 6, 6, 2)])]
        [9, 6, 6]
    """
    most = max(len(one["gold"]) for one in history[1:] or history)
    return [history[0], *(one for one in history[1:] if 2 * len(one["gold"]) >= most)]


def devices_of(module: L.LightningModule) -> list[torch.device]:
    """The devices whose random state is to be kept, beside the CPU."""
    return [module.device] if module.device.type == "cuda" else []


def held_out_prompts(trainer: L.Trainer, tokenizer: PreTrainedTokenizerBase, count: int) -> PromptBatch:
    """The first prompts of the validation data, this rank's share of them.

    Args:
        trainer: Within ``fit``, with validation data.
        tokenizer: Of the policy; writes the text of prompts that the data has as token ids only.
        count: Prompts on all ranks together, at most; at least one on each.

    Raises:
        ValueError: If there is no validation data.
        TypeError: If its batches hold neither prompts nor prompt groups.
    """
    loaders = trainer.val_dataloaders
    datamodule: L.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    if loaders is None and datamodule is not None:
        loaders = datamodule.val_dataloader()  # a run may validate later, or not at all
    loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    if not loader:
        raise ValueError(
            "held-out prompts are those of the validation data, and there is none: give the datamodule val data (or "
            "val_fraction), or fit a val_dataloaders"
        )
    share = max(1, len(range(trainer.global_rank, count, trainer.world_size)))
    found = PromptBatch((), (), ())
    for batch in loader:
        found = _joined(found, as_prompts(batch, tokenizer), share)
        if len(found) == share:
            break
    return found


def as_prompts(batch: Any, tokenizer: PreTrainedTokenizerBase) -> PromptBatch:  # noqa: ANN401 - of any loader
    """The prompts of a batch of prompts or of prompt groups.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(batch, PromptBatch):
        return batch
    if not isinstance(batch, PackedBatch):
        raise TypeError(f"a batch of validation data is a {type(batch).__name__}, which holds no prompts")
    ids = prompts_of(batch)
    texts = tuple(str(tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in ids)
    return PromptBatch(tuple(ids), texts, texts, {}, tuple(batch.row_ids))


def _joined(one: PromptBatch, other: PromptBatch, size: int) -> PromptBatch:
    names = other.columns
    return PromptBatch(
        (*one.prompt_ids, *other.prompt_ids)[:size],
        (*one.texts, *other.texts)[:size],
        (*one.prompts, *other.prompts)[:size],
        {name: [*one.columns.get(name, []), *other.columns[name]][:size] for name in names},
        (*one.row_ids, *other.row_ids)[:size],
    )


@dataclass(frozen=True)
class Judges:
    """What scores samples.

    Attributes:
        proxy: The reward that training maximises.
        gold: The reward that it stands for.
        generator: What samples.
        sampling: How.
    """

    proxy: Reward
    gold: Reward
    generator: Generator
    sampling: Sampling

    @torch.no_grad()
    def rows(
        self,
        prompts: PromptBatch,
        policy: LanguageModel,
        reference: Reference,
        tokenizer: PreTrainedTokenizerBase,
        seed: tuple[int, int],
        *,
        of_reference: bool,
    ) -> list[dict[str, Any]]:
        """Sample a completion of each prompt and score it.

        Args:
            prompts: At least one.
            policy: What samples, unless the reference does.
            reference: What the KL is from.
            tokenizer: Of both.
            seed: Of the run, and the number of the evaluation.
            of_reference: Sample from the reference instead; its KL is 0.

        Returns:
            ``row``, ``prompt``, ``completion``, ``kl`` in nats, ``proxy`` and ``gold`` of each prompt.
        """
        seeds = prompt_seeds(*seed, prompts.row_ids)
        if of_reference:
            with reference.active() as start:
                rollout = sample_rollout(prompts, self.generator, start, tokenizer, self.sampling, seeds)
            kl = torch.zeros(len(rollout))
        else:
            rollout = sample_rollout(prompts, self.generator, policy, tokenizer, self.sampling, seeds)
            kl = sampled_kl(rollout, policy, reference, self.sampling)
        proxy, gold = (judged(judge, rollout.samples).tolist() for judge in (self.proxy, self.gold))
        names = ("row", "prompt", "completion", "kl", "proxy", "gold")
        columns = (prompts.row_ids, prompts.prompts, rollout.samples.completions, kl.tolist(), proxy, gold)
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


@torch.no_grad()
def judged(reward: Reward, samples: Samples) -> Tensor:
    """Rewards of samples, ``(N,)``, with nothing counted in: statistics and multipliers are those of training."""
    with in_eval_mode(reward):
        return score(reward, samples).total


def rows_of_training(scored: Scored, proxy: Reward | str | None, gold: Reward) -> list[dict[str, Any]]:
    """What a rollout of training says of each of its prompts, as means over the prompt's completions.

    Args:
        scored: The rollout.
        proxy: None for the reward that training maximised, a name for a part of it, both as they were then.
        gold: What the proxy stands for.

    Returns:
        ``row``, ``kl`` in nats, ``proxy`` and ``gold`` of each prompt.
    """
    rollout = scored.rollout
    if isinstance(proxy, Reward):
        of_proxy = judged(proxy, rollout.samples)
    else:
        of_proxy = scored.rewards.total if proxy is None else scored.rewards.parts[proxy]
    counts = [len(group.completions) for group in rollout.groups]
    kl, proxies, golds = (
        [part.mean().item() for part in values.double().cpu().split(counts)]
        for values in (scored.kl, of_proxy, judged(gold, rollout.samples))
    )
    rows = [group.row_id for group in rollout.groups]
    names = ("row", "kl", "proxy", "gold")
    return [dict(zip(names, values, strict=True)) for values in zip(rows, kl, proxies, golds, strict=True)]


@torch.no_grad()
def sampled_kl(rollout: Rollout, policy: LanguageModel, reference: Reference, sampling: Sampling) -> Tensor:
    """KL(π‖π_ref) of each of a policy's own samples, the vocabulary summed out at every token, ``(N,)``, in nats."""
    device = next(policy.parameters()).device
    found = []
    with gathered(policy, *reference.language_models):
        for batch in rollout.in_order(sampling.batch_size):
            batch = batch.to(device)
            hidden = policy.hidden_states(batch)
            tokens = reference.compare(hidden, batch, temperature=sampling.temperature).kl
            found.append(sum_by_sequence(tokens, batch.target_lengths))
    return torch.cat(found)
