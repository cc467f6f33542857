import os
import signal

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_rlhf import SFT, Optimization
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

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def run(llama_dir, folder, monkeypatch, interrupt=None):
    monkeypatch.setattr(stage, "LOG_EVERY", 2)
    L.seed_everything(0, verbose=False)
    module = SFT(llama_dir, optimization=Optimization(lr=1e-2))
    if interrupt is not None:
        plain = L.Trainer
        monkeypatch.setattr(
            stage.L,
            "Trainer",
            lambda callbacks, **settings: plain(callbacks=[*callbacks, Interrupt(interrupt)], **settings),
        )
    curve = stage.train(
        module, Data(), folder, metric="train/loss", max_epochs=1, save_every=5, gradient_clip_val=1.0
    )
    return module, curve


def test_an_interrupted_stage_goes_on_bit_for_bit(llama_dir, tmp_path, monkeypatch):
    whole, curve = run(llama_dir, tmp_path / "whole", monkeypatch)
    assert curve.steps == list(range(2, 25, 2))
    assert curve.values[-1] < curve.values[0]
    assert curve.seconds > 0
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises((SystemExit, KeyboardInterrupt)):
        run(llama_dir, tmp_path / "cut", patch, interrupt=13)
    signal.signal(
        signal.SIGINT, before
    )  # Lightning ignores Ctrl-C from then on, expecting the process to end
    again, resumed = run(llama_dir, tmp_path / "cut", monkeypatch)
    # The module logs step 10 just after the checkpoint of step 10 is written: the curve lacks that point.
    expected = dict(zip(curve.steps, curve.values, strict=True))
    del expected[10]
    assert dict(zip(resumed.steps, resumed.values, strict=True)) == expected
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    assert stage.last_checkpoint(tmp_path) is None
    torch.save({"algorithm": "SFT", "state_dict": {}}, tmp_path / "step=5.ckpt")
    os.utime(tmp_path / "step=5.ckpt", (1, 1))
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "step=5.ckpt").read_bytes()[:100])
    assert stage.last_checkpoint(tmp_path) == tmp_path / "step=5.ckpt"
