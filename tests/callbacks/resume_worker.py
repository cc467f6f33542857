"""A run that may be killed: trains with LoRA dropout, writes losses and weights. Run by test_exact_resume."""

import json
import os
import signal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_rlhf.algorithms import DPO, SFT, Optimization
from lightning_rlhf.callbacks import ExactResume
from lightning_rlhf.data import PreferenceDataModule, SFTDataModule
from lightning_rlhf.models import LoRA, Policy


class Losses(Callback):
    def __init__(self, path: str, kill_at: int) -> None:
        self.path, self.kill_at = path, kill_at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with open(self.path, "a") as log:
            log.write(json.dumps([trainer.global_step, float(outputs["loss"]), list(batch.row_ids)]) + "\n")
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(
    algorithm: str, model_dir: str, data: str, output: str, workers: int, kill_at: int, ckpt: str = ""
) -> None:
    L.seed_everything(3)
    policy = Policy(model_dir, lora=LoRA(r=2, dropout=0.3, init="gaussian"))
    settings = Optimization(lr=1e-2)
    module = (SFT if algorithm == "SFT" else DPO)(policy, optimization=settings)
    datamodule = (SFTDataModule if algorithm == "SFT" else PreferenceDataModule)(
        data, batch_size=4, num_workers=workers
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ExactResume(),
            Losses(f"{output}.losses", kill_at),
            ModelCheckpoint(dirpath=f"{output}.checkpoints", every_n_train_steps=4, save_top_k=-1),
        ],
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt or None)
    torch.save({n: p for n, p in module.state_dict().items() if "lora" in n}, f"{output}.weights")
