"""A QLoRA training that may be killed: the same function in this process and in another. Used by test_qlora."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_rlhf.algorithms import DPO, SFT, Optimization
from lightning_rlhf.algorithms.base import Algorithm
from lightning_rlhf.callbacks import ExactResume
from lightning_rlhf.data import PreferenceDataModule, SFTDataModule
from lightning_rlhf.models import LoRA, Policy, Quantization

SAVE_EVERY, STEPS = 4, 24
NF4 = Quantization(bits=4, quant_type="nf4", double_quant=True, compute_dtype="bfloat16")


class Losses(Callback):
    """Keep every step's loss, and kill the process after one."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at, self.found = kill_at, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        # The sum over the batch, of which Lightning takes the gradient; the number of terms is the same every time.
        self.found[trainer.global_step] = float(outputs["loss"])
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    algorithm: str,
    model_dir: str,
    data: str,
    folder: Path,
    device: str,
    *,
    kill_at: int = -1,
    ckpt: Path | None = None,
) -> tuple[Algorithm, dict[int, float]]:
    """Train with LoRA dropout on a base in 4 bits, in bf16: the module, and the loss of every step."""
    L.seed_everything(3, verbose=False)
    policy = Policy(model_dir, lora=LoRA(r=4, dropout=0.1), quantization=NF4)
    settings = Optimization(lr=2e-2, schedule="constant")
    module = (SFT if algorithm == "SFT" else DPO)(policy, optimization=settings)
    datamodule = (SFTDataModule if algorithm == "SFT" else PreferenceDataModule)(data, batch_size=8)
    losses = Losses(kill_at)
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1)
    trainer = L.Trainer(
        accelerator=device,
        devices=1,
        precision="bf16-mixed",
        max_epochs=-1,
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactResume(), losses, saver],
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt)
    return module, losses.found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[7]))
    train(*sys.argv[1:4], Path(sys.argv[4]), sys.argv[5], kill_at=int(sys.argv[6]))
