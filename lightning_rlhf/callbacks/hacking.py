"""Looks for reward hacking while a policy is trained: all detectors over its samples of held-out prompts."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_rlhf.algorithms.online import Online
from lightning_rlhf.algorithms.rollout import prompt_seeds, sample_rollout
from lightning_rlhf.callbacks.hacking_samples import (
    Row,
    add_rewards,
    answer_rows,
    asked_of,
    found_in,
    questions,
    sample_rows,
)
from lightning_rlhf.callbacks.held_out import devices_of, held_out_prompts, parts_of, sampled_kl
from lightning_rlhf.callbacks.sample_table import gathered
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.generation import HFGenerator, Sampling
from lightning_rlhf.metrics import hacking
from lightning_rlhf.rewards import Reward


class Probe(NamedTuple):
    """Prompts of one kind, and how many samples each has."""

    prompts: PromptBatch
    num_samples: int


class HackingMonitor(Callback):
    """Sample the policy every so many steps, and log what every detector of reward hacking finds.

    For any module with a ``policy``, its ``tokenizer`` and a ``reference``, whose own samples of the same prompts are
    the control. Logs ``hacking/…`` and writes ``hacking/hacking.json`` in the log folder: the names are those that
    the metrics of :mod:`lightning_rlhf.metrics.hacking` compute, the length's with ``length_`` before them. What has
    nothing to measure is left out. Random numbers of training and running statistics of rewards are left as they were;
    the control's samples and all evaluations are part of checkpoints.

    Always: length, format, diversity. With ``benign_prompts`` refusals; with ``num_questions`` sycophancy, certainty in
    wrong answers and, given a reward, its taste for confident nonsense; where the reward has members, their
    disagreement.

    Args:
        reward: Whose correlation with length is measured; by default the module's own, where it has one.
        every_n_steps: Optimizer steps between evaluations, at least.
        num_prompts: The first ones of the validation data, on all ranks together.
        num_samples: Of each of them, at least 2, for diversity.
        benign_prompts: Prompts that no one need refuse.
        num_questions: With known answers: facts, and then sums and products.
        max_new_tokens: Tokens of an answer at most.
        temperature: Of the samples.
        batch_size: Prompts at a time.
        confidence: Of the intervals.
        seed: Of the samples.

    Raises:
        ValueError: If an argument is out of range; at the start, if the module has no reference or there is no
            validation data.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        every_n_steps: int = 100,
        num_prompts: int = 64,
        num_samples: int = 2,
        benign_prompts: list[str] | None = None,
        num_questions: int = 0,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        batch_size: int = 32,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1 or num_prompts < 2 or num_samples < 2 or num_questions < 0:
            raise ValueError(
                f"every_n_steps ({every_n_steps}) must be at least 1, num_prompts ({num_prompts}) and num_samples "
                f"({num_samples}) at least 2, and num_questions ({num_questions}) not negative"
            )
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.reward = reward
        self.every_n_steps, self.num_prompts, self.num_samples = every_n_steps, num_prompts, num_samples
        self.benign_prompts = list(benign_prompts or ())
        self.questions = questions(num_questions)
        self.settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "batch_size": batch_size,
        }
        self.confidence, self.seed = confidence, seed
        self.control: dict[str, list[Row]] = {}
        self.history: list[dict[str, float]] = []
        self._probes: dict[str, Probe] = {}

    # --- hooks ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the reward ready."""
        policy, _, tokenizer = parts_of(pl_module)
        if self.reward is not None:
            self.reward.attach(policy, tokenizer)
            self.reward.to(pl_module.device)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the prompts, and sample the starting policy unless a checkpoint did."""
        self._probes = self._find_probes(trainer, pl_module)
        if not self.control:
            self.control, _ = self._sample(trainer, pl_module, of_reference=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Evaluate where enough steps were taken."""
        last = self.history[-1]["step"] if self.history else 0
        if trainer.global_step - last >= self.every_n_steps:
            pl_module.log_dict(self._evaluate(trainer, pl_module), logger=False, batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the policy as it ends."""
        if not self.history or trainer.global_step > self.history[-1]["step"]:
            self._evaluate(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The control's samples and what was found so far, as plain lists."""
        return {"control": self.control, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.control, self.history = dict(state_dict["control"]), list(state_dict["history"])

    # --- an evaluation --------------------------------------------------------------------------------------------

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        rows, kl = self._sample(trainer, pl_module, of_reference=False)
        found = found_in(rows, self.control, self.questions, kl=kl, confidence=self.confidence)
        values = {f"hacking/{name}": value for name, value in found.items() if not math.isnan(value)}
        self.history.append({"step": trainer.global_step, **values})
        for logger in trainer.loggers:  # not by log(), which writes every log_every_n_steps only
            logger.log_metrics(values, step=trainer.global_step)
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "hacking"  # a collective of all ranks
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hacking.json").write_text(json.dumps(self.history, indent=1) + "\n")
        return values

    def _find_probes(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Probe]:
        tokenizer = parts_of(pl_module)[2]
        with torch.random.fork_rng(devices_of(pl_module)):
            prompts = held_out_prompts(trainer, tokenizer, self.num_prompts)
        pairs = hacking.opinion_prompts(self.questions)
        texts = {
            "benign": (self.benign_prompts, 1),
            "plain": ([pair.plain for pair in pairs], 2),
            "opinion": ([pair.opinion for pair in pairs], 1),
        }
        share = slice(trainer.global_rank, None, trainer.world_size)
        asked = {
            kind: Probe(asked_of(tokenizer, several, share), n)
            for kind, (several, n) in texts.items()
            if several
        }
        probes = {"held_out": Probe(prompts, self.num_samples), **asked}
        for kind, probe in probes.items():
            if not len(probe.prompts):
                raise ValueError(
                    f"process {trainer.global_rank} of {trainer.world_size} has no prompt of the kind {kind}: give at "
                    "least one a process (num_prompts, benign_prompts, num_questions)"
                )
        return probes

    def _sample(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *, of_reference: bool
    ) -> tuple[dict[str, list[Row]], float]:
        """The samples of all ranks by kind, and the mean KL of those of held-out prompts."""
        policy, reference, tokenizer = parts_of(pl_module)
        reward = self._reward_of(pl_module)
        found: dict[str, list[Row]] = {}
        with torch.random.fork_rng(devices_of(pl_module)), torch.no_grad():
            for kind, (prompts, count) in self._probes.items():
                sampling = Sampling(num_samples=count, **self.settings)  # type: ignore[arg-type]
                seeds = prompt_seeds(self.seed, len(self.history) + (not of_reference), prompts.row_ids)
                with reference.active() if of_reference else nullcontext(policy) as model:
                    rollout = sample_rollout(prompts, HFGenerator(), model, tokenizer, sampling, seeds)
                rows = sample_rows(prompts, rollout.samples, count)
                if kind == "held_out":
                    kl = torch.zeros(len(rollout))
                    if not of_reference:
                        kl = sampled_kl(rollout, policy, reference, sampling)
                    add_rewards(rows, rollout.samples, kl, reward)
                found[kind] = gathered(rows, trainer.world_size)
        if self.questions and reward is not None and not of_reference:
            own = answer_rows(self._probes["plain"].prompts, tokenizer, self.questions, reward)
            found["answers"] = gathered(own, trainer.world_size)
        distances = [value for row in found["held_out"] for value in row["kl"]]
        return found, sum(distances) / len(distances)

    def _reward_of(self, module: L.LightningModule) -> Reward | None:
        return self.reward or (module.reward if isinstance(module, Online) else None)
