"""PPO with roles as adapters that may be killed, and one process of it under DDP. Used by test_ppo_processes."""

import os
import signal
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_rlhf.algorithms import GAE, PPO, KLControl, Optimization, Update
from lightning_rlhf.callbacks import ExactResume
from lightning_rlhf.data import PromptDataModule
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models import LoRA, Policy
from tests.algorithms.conftest import Gradients
from tests.algorithms.rollouts import Waves, prompts

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
PER_ROLLOUT, ROLLOUTS = 4, 6


class Remember(Callback):
    """What every rollout was, and the end of the process in the middle of one."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at, self.found = kill_at, []

    def on_train_start(self, trainer, module):
        def maybe_kill(*_):
            self.steps += 1
            if self.steps == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        self.steps = trainer.global_step
        trainer.optimizers[0].register_step_post_hook(maybe_kill)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if "time" not in n}
        self.found.append((trainer.global_step, batch.row_ids, module.kl.coef, metrics))


def train(model_dir: str, data: str, folder: Path, *, kill_at: int = -1, ckpt: Path | None = None):
    """Sampling on, adaptive KL on, LoRA with dropout in its settings; a checkpoint after every rollout."""
    L.seed_everything(3, verbose=False)
    module = PPO(
        Policy(model_dir, lora=LoRA(r=2, dropout=0.3)),
        Waves(),
        sampling=Sampling(max_new_tokens=6, num_samples=2, temperature=0.8),
        estimator=GAE(),
        kl=KLControl(coef=0.1, target=0.5, horizon=50),
        optimization=Optimization(lr=1e-2),
        update=Update(num_epochs=2, minibatch_size=4, micro_batch_size=3, entropy_coef=0.01),
    )
    seen = Remember(kill_at)
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=PER_ROLLOUT, save_top_k=-1)
    trainer = L.Trainer(max_epochs=2, callbacks=[ExactResume(), seen, saver], **QUIET)
    trainer.fit(module, datamodule=PromptDataModule(data, batch_size=4), ckpt_path=ckpt)
    return module, seen.found


def parallel(model_dir: str, world: int, output: str) -> None:
    """Two rollouts of eight prompts, all ranks together; one minibatch an epoch, in several micro-batches."""
    L.seed_everything(0, verbose=False)  # by which DDP seeds every rank anew
    module = PPO(
        Policy(model_dir, lora=LoRA(r=2, init="gaussian")),
        Waves(),
        sampling=Sampling(max_new_tokens=6, num_samples=2),
        estimator=GAE(whiten_rewards=True),
        kl=KLControl(coef=0.1, target=0.01, horizon=50),
        optimization=Optimization(name="sgd", lr=0.1, schedule="constant"),
        update=Update(num_epochs=2, minibatch_size=64, micro_batch_size=3),
    )
    seen = Gradients()
    seen.on_train_batch_start = seen.on_train_epoch_end = lambda *_: None
    strategy = "ddp" if world > 1 else "auto"
    trainer = L.Trainer(
        devices=world, strategy=strategy, max_epochs=3, callbacks=[seen], enable_checkpointing=False, **QUIET
    )
    trainer.fit(module, prompts(8, 8 // world), prompts(6, 2, seed=5))
    weights = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "time" not in name}
    found = {"gradients": seen.steps, "weights": weights, "metrics": metrics, "coef": module.kl.coef}
    torch.save(found, f"{output}.{trainer.global_rank}")
