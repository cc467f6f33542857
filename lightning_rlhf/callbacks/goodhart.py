"""Watches a gold reward while a proxy is trained on, and acts when they part."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_rlhf.algorithms import PPO
from lightning_rlhf.algorithms.online import Online
from lightning_rlhf.callbacks.held_out import (
    Judges,
    devices_of,
    held_out_prompts,
    moving,
    parts_of,
    reward_of,
    rows_of_training,
    without_rest,
)
from lightning_rlhf.callbacks.sample_table import gathered
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.functional import DeclineTest, decline_test, decline_threshold
from lightning_rlhf.functional.overoptimization import Method
from lightning_rlhf.generation import HFGenerator, Sampling
from lightning_rlhf.metrics.goodhart import curve_of, fit_of, summary_of
from lightning_rlhf.metrics.goodhart_plot import draw
from lightning_rlhf.rewards import Reward

OnAlarm = Literal["warn", "stop", "raise_kl"]
COLUMNS = ("kl", "proxy", "gold")


class GoodhartMonitor(Callback):
    """Sample held-out prompts every so many steps, score them by proxy and gold, and say when gold falls.

    For any module with a ``policy`` (a :class:`~lightning_rlhf.models.LanguageModel`), its ``tokenizer`` and a
    ``reference``. The reference's own samples come first, at KL 0: they standardise both rewards. Logs ``goodhart/…``
    (see docs/goodhart.md). In the log folder, ``goodhart/`` has ``goodhart.json`` and ``goodhart.png``, every sample's
    KL and rewards and some samples' texts as ``evaluations.json``, and ``best_gold.ckpt``, whenever gold is better than
    at the start and ever since. It is the best of many noisy means, so measure its gold on other samples.

    With ``rollouts``, later evaluations are of what the module samples for training anyway, each rollout before
    anything is learned from it: gold is asked about every sample, and nothing else is added. An evaluation then has the
    rollouts since the one before, of two prompts at least, a prompt's samples as their mean, and no texts are kept. It
    says what the policy was when it sampled them: the checkpoint that is kept as best has learned from them since. The
    start is still that of the held-out prompts, so these should be of the same kind as those of training.

    An alarm is :func:`~lightning_rlhf.functional.decline_test`: gold falls while the proxy rises, both by more than
    chance, over all looks of a run. Afterwards the test begins anew, with the evaluation that gave the alarm. Random
    numbers of training are left as they were, and the evaluations are part of checkpoints.

    Args:
        gold: What the proxy stands for: a rule, a larger or held-out reward model, a judge. It has models of its own:
            it is attached after the strategy has wrapped the policy.
        proxy: What training maximises: a reward, or the name that a part of the module's own is logged under, which
            costs nothing more; by default the whole of the module's own. With ``rollouts`` its own is taken as it was
            then. What moves along the run does not compare: of a reward with
            :class:`~lightning_rlhf.rewards.Normalized` (refused) or with multipliers
            (:class:`~lightning_rlhf.rewards.ConstrainedReward`), give a part.
        every_n_steps: Optimizer steps between evaluations, at least.
        num_prompts: The first ones of the validation data, on all ranks together.
        max_new_tokens: Tokens of an answer at most; with ``rollouts`` the module's own sampling is taken.
        temperature: Divides the logits of policy and reference; as in training. With ``rollouts`` likewise.
        batch_size: Prompts at a time.
        method: The form that is fitted to gold.
        on_alarm: ``warn``, ``stop`` training, or ``raise_kl``: multiply PPO's ``kl.coef``.
        kl_factor: By which ``raise_kl`` multiplies.
        false_alarm_rate: Probability of a false alarm in a run of ``max_evaluations``.
        max_evaluations: What the threshold is made for; more of them make a false alarm more likely.
        seed: Of the samples.
        num_texts: Prompts, the first ones, whose samples are kept as texts: what ``lightning-rlhf report`` shows.
        rollouts: After the start, judge the rollouts of training instead of sampling held-out prompts.

    Raises:
        ValueError: If an argument is out of range; at the start, if the module has no reference, there is no
            validation data, or ``on_alarm``, ``rollouts`` or the reward does not fit.
    """

    def __init__(
        self,
        gold: Reward,
        proxy: Reward | str | None = None,
        every_n_steps: int = 50,
        num_prompts: int = 128,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        batch_size: int = 32,
        method: Method = "rl",
        on_alarm: OnAlarm = "warn",
        kl_factor: float = 2.0,
        false_alarm_rate: float = 0.05,
        max_evaluations: int = 100,
        seed: int = 0,
        num_texts: int = 4,
        rollouts: bool = False,
    ) -> None:
        if every_n_steps < 1 or num_prompts < 2 or num_texts < 0:
            raise ValueError(
                f"every_n_steps ({every_n_steps}) must be at least 1, num_prompts ({num_prompts}) at least 2, and "
                f"num_texts ({num_texts}) not negative"
            )
        if temperature <= 0 or kl_factor <= 1:
            raise ValueError(
                f"temperature ({temperature}) must be positive, and kl_factor ({kl_factor}) more than 1"
            )
        if on_alarm not in ("warn", "stop", "raise_kl"):
            raise ValueError(f"on_alarm must be warn, stop or raise_kl, got {on_alarm!r}")
        self.gold, self.proxy = gold, proxy
        self.every_n_steps, self.num_prompts = every_n_steps, num_prompts
        self.sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size
        )
        self.method: Method = method
        self.on_alarm: OnAlarm = on_alarm
        self.kl_factor = kl_factor
        self.threshold = decline_threshold(max_evaluations, false_alarm_rate=false_alarm_rate)
        self.seed, self.num_texts = seed, 0 if rollouts else num_texts
        self.rollouts = rollouts
        self.history: list[dict[str, Any]] = []
        self.alarms: list[int] = []
        self.best: dict[str, Any] = {}
        self._since = 0
        self._pool: list[dict[str, Any]] = []
        self._began = self._seconds = 0.0
        self._prompts = PromptBatch((), (), ())
        self._judges: Judges | None = None

    # --- hooks ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the module fits, and make the rewards ready."""
        policy, _, tokenizer = parts_of(pl_module)
        if self.on_alarm == "raise_kl":
            require_raisable(pl_module)
        if self.rollouts and not isinstance(pl_module, Online):
            raise ValueError(
                f"rollouts: true judges what a module samples for training, and {type(pl_module).__name__} samples "
                "nothing: leave it out"
            )
        proxy = self.proxy
        if not isinstance(proxy, Reward):
            proxy = reward_of(pl_module, proxy)
        elif moving(proxy):
            raise ValueError(
                "the proxy is Normalized, which changes with what it has seen: give the reward without it"
            )
        for reward in [self.gold] + ([proxy] if proxy is self.proxy else []):
            reward.attach(policy, tokenizer)
            reward.to(pl_module.device)
        sampling = self.sampling
        if self.rollouts and isinstance(pl_module, Online):  # the start as all that follows
            sampling = replace(pl_module.sampling, num_samples=1, batch_size=sampling.batch_size)
        self._judges = Judges(proxy, self.gold, HFGenerator(), sampling)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the prompts, and sample the starting policy unless a checkpoint did."""
        self._began, self._seconds = time.perf_counter(), 0.0
        with torch.random.fork_rng(devices_of(pl_module)):
            self._prompts = held_out_prompts(trainer, parts_of(pl_module)[2], self.num_prompts)
        if not self.history:
            self._evaluate(trainer, pl_module, at_start=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Evaluate where enough steps were taken, and act on an alarm."""
        if self.rollouts:
            self._judge_rollout(trainer, pl_module)
        if trainer.global_step - self.history[-1]["step"] < self.every_n_steps or self._too_few():
            return
        values = self._evaluate(trainer, pl_module)
        pl_module.log_dict(values, logger=False, batch_size=1)  # for ModelCheckpoint and EarlyStopping

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the policy as it ends, or the last rollouts."""
        if trainer.global_step > self.history[-1]["step"] and not self._too_few():
            self._evaluate(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The evaluations so far, as plain lists."""
        return {
            "history": self.history,
            "alarms": self.alarms,
            "best": self.best,
            "since": self._since,
            "pool": self._pool,
            "how": self._how(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If its evaluations were made in another way.
        """
        for name, now in self._how().items():
            if state_dict["how"][name] != now:
                raise ValueError(
                    f"the checkpoint's evaluations were made with {name}: {state_dict['how'][name]}, and now it is "
                    f"{now}: resume with the same, or start a new run"
                )
        self.history, self.alarms = list(state_dict["history"]), list(state_dict["alarms"])
        self.best, self._since = dict(state_dict["best"]), state_dict["since"]
        self._pool = list(state_dict["pool"])

    # --- an evaluation --------------------------------------------------------------------------------------------

    def _how(self) -> dict[str, Any]:
        """What evaluations must have in common."""
        proxy = self.proxy.name if isinstance(self.proxy, Reward) else self.proxy
        found = {"rollouts": self.rollouts, "gold": self.gold.name, "proxy": proxy}
        if self.rollouts:
            return found
        return {
            **found,
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
        }

    def _too_few(self) -> bool:
        """Whether the rollouts have a single prompt, which has no standard error."""
        return self.rollouts and len(self._pool) < 2

    def _evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *, at_start: bool = False
    ) -> dict[str, float]:
        began = time.perf_counter()
        if self.rollouts and not at_start:
            rows, self._pool = self._pool, []
        else:
            rows = self._sampled(trainer, pl_module, at_start=at_start)
        self._remember(trainer.global_step if not at_start else 0, rows)
        result = self._test()
        values = self._summary() | {
            "goodhart/alarm": float(result.alarm),
            "goodhart/time_share": self._seconds / (began - self._began),
        }
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "goodhart"  # a collective of all ranks
        if result.alarm:
            self._alarm(trainer, pl_module, result)
        self._keep_best(trainer, folder, at_start=at_start)
        for logger in trainer.loggers:  # not by log(), which writes every log_every_n_steps only
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.is_global_zero:
            self._write(folder, values)
        self._seconds += time.perf_counter() - began
        return values

    def _sampled(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *, at_start: bool
    ) -> list[dict[str, Any]]:
        policy, reference, tokenizer = parts_of(pl_module)
        assert self._judges is not None
        with torch.random.fork_rng(devices_of(pl_module)):
            seed = (self.seed, len(self.history))
            own = self._judges.rows(self._prompts, policy, reference, tokenizer, seed, of_reference=at_start)
        return gathered(own, trainer.world_size)

    def _judge_rollout(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        began = time.perf_counter()
        assert isinstance(pl_module, Online)
        assert pl_module.last_rollout is not None
        own = rows_of_training(pl_module.last_rollout, self.proxy, self.gold)
        self._pool += gathered(own, trainer.world_size)
        self._seconds += time.perf_counter() - began

    def _remember(self, step: int, rows: list[dict[str, Any]]) -> None:
        ids = [row["row"] for row in rows]
        if not self.rollouts and self.history and ids != self.history[-1]["rows"]:
            raise ValueError(
                "the held-out prompts are not those of the checkpoint's evaluations: resume with the same validation "
                "data and num_prompts, or start a new run"
            )
        columns = {name: [row[name] for row in rows] for name in COLUMNS}
        texts = {"completions": [row["completion"] for row in rows[: self.num_texts]]}
        if not self.history and self.num_texts:  # once, the prompts being the same ever after
            texts["prompts"] = [row["prompt"] for row in rows[: self.num_texts]]
        self.history.append({"step": step, "rows": ids, **columns, **texts})

    def _test(self) -> DeclineTest:
        # Of other prompts than the rollouts, the start says nothing of a decline among them.
        since = max(self._since, 1) if self.rollouts else self._since
        gold, proxy = (
            [torch.tensor(one[name], dtype=torch.float64) for one in self.history[since:]]
            for name in ("gold", "proxy")
        )
        if not self.rollouts:
            return decline_test(torch.stack(gold), torch.stack(proxy), threshold=self.threshold)
        return decline_test(gold, proxy, threshold=self.threshold)

    def _evaluations(self) -> list[Tensor]:
        return [
            torch.tensor([[one["step"]] * len(one["kl"]), *(one[name] for name in COLUMNS)]).double().T
            for one in self.history
        ]

    def _summary(self) -> dict[str, float]:
        found = summary_of(
            self._evaluations(), method=self.method, confidence=0.95, num_resamples=1000, seed=self.seed
        )
        return {f"goodhart/{name}": value.item() for name, value in found.items()}

    def _alarm(self, trainer: L.Trainer, pl_module: L.LightningModule, result: DeclineTest) -> None:
        step = self.history[-1]["step"]
        self.alarms.append(step)
        self._since = len(self.history) - 1
        done = "look at samples, and go back to the checkpoint that is best by gold"
        if self.on_alarm == "stop":
            trainer.should_stop = True
            done = "training stops"
        elif isinstance(pl_module, PPO) and self.on_alarm == "raise_kl":
            pl_module.kl.coef *= self.kl_factor
            done = f"kl.coef is now {pl_module.kl.coef:.4g}"
        rank_zero_warn(
            f"over-optimisation at step {step}: gold fell by {result.statistic:.1f} standard errors while the proxy "
            f"rose by {result.proxy_rise:.1f}: {done}"
        )

    def _keep_best(self, trainer: L.Trainer, folder: Path, *, at_start: bool) -> None:
        latest = self.history[-1]
        if without_rest(self.history)[-1] is not latest:
            return  # the luck of few prompts
        gold = sum(latest["gold"]) / len(latest["gold"])
        if self.best and gold <= self.best["gold"]:
            return
        path = "" if at_start else str(folder / "best_gold.ckpt")
        self.best = {"step": latest["step"], "gold": gold, "path": path}
        if path:
            trainer.save_checkpoint(path)

    def _write(self, folder: Path, values: dict[str, float]) -> None:
        curve = curve_of(self._evaluations())
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "method": self.method,
            "latest": {name: finite(value) for name, value in values.items()},
            "curve": {name: [finite(v) for v in column.tolist()] for name, column in curve._asdict().items()},
            "best": self.best,
            "alarms": self.alarms,
            "threshold": self.threshold,
        }
        (folder / "goodhart.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "evaluations.json").write_text(json.dumps(self.history) + "\n")
        figure, _ = draw(curve, fit_of(curve, self.method))
        assert figure is not None
        figure.savefig(folder / "goodhart.png", dpi=120)


def require_raisable(module: L.LightningModule) -> None:
    """Refuse to raise a KL coefficient that is not there, is 0, or is steered by a target.

    Raises:
        ValueError: If so.
    """
    if not isinstance(module, PPO):
        raise ValueError(
            f"on_alarm raise_kl multiplies PPO's kl.coef, and {type(module).__name__} has none: choose warn or stop"
        )
    if module.kl.coef <= 0 or module.kl.control.target is not None:
        raise ValueError(
            f"on_alarm raise_kl needs a kl.coef that is positive and not steered, got coef {module.kl.coef} and target "
            f"{module.kl.control.target}: set kl.target: null and a positive kl.coef, or choose warn or stop"
        )


def finite(value: float) -> float | None:
    """A number that JSON has; None for infinity and nan.

    Example:
        >>> finite(1.5), finite(float("inf"))
        (1.5, None)
    """
    return value if math.isfinite(value) else None
