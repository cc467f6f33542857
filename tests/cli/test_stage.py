import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_rlhf import SFT, Optimization
from lightning_rlhf.callbacks import ExactResume
from lightning_rlhf.cli import stage
from lightning_rlhf.data.packing import PromptGroup, pack


class Rows(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        return PromptGroup([3 + index % 7], [[5 + index % 9, 6, 2]], row_id=index)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return StatefulDataLoader(Rows(), batch_size=2, collate_fn=pack)


class Interrupt(L.Callback):
    """Ctrl-C at one step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def run(llama_dir, folder, *callbacks):
    """Train as the pipeline has it done; the module, and what it logged."""
    L.seed_everything(0, verbose=False)
    module = SFT(llama_dir, optimization=Optimization(lr=1e-2))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        callbacks=[
            stage.StageCheckpoint(str(folder / "checkpoints"), every_n_train_steps=5),
            ExactResume(),
            Timer(interval="step"),
            *callbacks,
        ],
        log_every_n_steps=2,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    resume = stage.last_checkpoint(folder / "checkpoints")
    trainer.fit(module, datamodule=Data(), ckpt_path=resume, weights_only=True)
    return module, stage.logged(folder / "lightning_logs", "train/loss")


def test_an_interrupted_stage_goes_on_bit_for_bit(llama_dir, tmp_path):
    whole, curve = run(llama_dir, tmp_path / "whole")
    assert curve["steps"] == list(range(1, 24, 2))
    assert curve["values"][-1] < curve["values"][0]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run(llama_dir, tmp_path / "cut", Interrupt(13))
    # Lightning ignores Ctrl-C from then on, expecting the process to end.
    signal.signal(signal.SIGINT, before)
    checkpoints = tmp_path / "cut" / "checkpoints"
    cut = stage.last_checkpoint(checkpoints)
    assert [path.name for path in checkpoints.iterdir()] == [cut.name] == ["epoch=0-step=10.ckpt"]
    seconds = stage.training_seconds(cut)
    again, resumed = run(llama_dir, tmp_path / "cut")
    assert stage.training_seconds(checkpoints / stage.END) > seconds > 0
    assert resumed == curve
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    assert stage.last_checkpoint(tmp_path) is None
    torch.save({"algorithm": "SFT", "state_dict": {}}, tmp_path / "step=5.ckpt")
    os.utime(tmp_path / "step=5.ckpt", (1, 1))
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "step=5.ckpt").read_bytes()[:100])
    assert stage.last_checkpoint(tmp_path) == tmp_path / "step=5.ckpt"


def test_the_seconds_before_an_interruption_count(tmp_path):
    kept = {"algorithm": "SFT", "state_dict": {}, "callbacks": {"Timer": {"time_elapsed": {"train": 7.5}}}}
    torch.save(kept, tmp_path / "end.ckpt")
    assert stage.training_seconds(tmp_path / "end.ckpt") == 7.5


def test_what_a_later_run_logged_again_counts(tmp_path):
    for version, text in {
        9: "epoch,step,a,b\n0,1,0.5,\n0,1,,7\n0,3,0.25,\n",
        10: "epoch,step,a\n0,3,0.75\n0,5,1e-3\n",
    }.items():
        (tmp_path / f"version_{version}").mkdir()
        (tmp_path / f"version_{version}" / "metrics.csv").write_text(text)
    assert stage.logged(tmp_path, "a") == {"steps": [1, 3, 5], "values": [0.5, 0.75, 0.001]}
    assert stage.logged(tmp_path, "b") == {"steps": [1], "values": [7.0]}
    assert stage.logged(tmp_path, "c") == {"steps": [], "values": []}
