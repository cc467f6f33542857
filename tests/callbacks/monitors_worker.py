"""DPO watched by both monitors and OnlineDPO by its rollouts, in one process or as one of two: see
test_monitors_processes."""

import json
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, OnlineDPO, Optimization
from lightning_rlhf.callbacks import ExactResume, GoodhartMonitor, HackingMonitor
from lightning_rlhf.data.packing import pack
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.rewards import FunctionReward, RewardEnsemble
from tests.algorithms.conftest import random_groups
from tests.algorithms.test_online_dpo import prompts

PROMPTS = 7  # no multiple of two: one rank has a prompt more


def long(completions):
    return [float(len(text)) for text in completions]


def vowels(completions):
    return [sum(text.count(letter) for letter in "aeiou") + 0.01 * len(text) for text in completions]


def train(model_dir: str, world: int, folder: Path, name: str, epochs: int, ckpt: Path | None = None) -> None:
    """Eight pairs an optimizer step, all ranks together; what was logged is in ``folder/name``."""
    L.seed_everything(0, verbose=False)
    module = DPO(
        Policy(model_dir, lora=LoRA(r=2, init="gaussian")),
        optimization=Optimization(name="sgd", lr=0.2, schedule="constant"),
    )
    small = {"every_n_steps": 1, "num_prompts": PROMPTS, "max_new_tokens": 5, "batch_size": 4}
    goodhart = GoodhartMonitor(gold=FunctionReward(vowels), proxy=FunctionReward(long), **small)
    members = RewardEnsemble([FunctionReward(long), FunctionReward(vowels)])
    hacking = HackingMonitor(members, benign_prompts=["abc", "de", "f"], num_questions=5, **small)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=epochs,
        logger=CSVLogger(folder, name=name, version=0),
        callbacks=[
            ExactResume(),
            goodhart,
            hacking,
            ModelCheckpoint(dirpath=folder / f"{name}_checkpoints", filename="{epoch}", save_top_k=-1),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loaders = (
        DataLoader(random_groups(8, 2, seed), batch_size=8 // world, collate_fn=pack) for seed in (0, 1)
    )
    trainer.fit(module, *loaders, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    found = {"goodhart": goodhart.history, "hacking": hacking.history, "control": hacking.control}
    (folder / f"{name}.{trainer.global_rank}.json").write_text(json.dumps(found))


def online(model_dir: str, world: int, folder: Path) -> None:
    """Two rollouts of eight prompts, judged as they are; the history is in ``folder``."""
    L.seed_everything(0, verbose=False)
    module = OnlineDPO(
        Policy(model_dir, lora=LoRA(r=2, init="gaussian")),
        reward=FunctionReward(long),
        sampling=Sampling(max_new_tokens=5, num_samples=3),
        optimization=Optimization(name="sgd", lr=0.2, schedule="constant"),
    )
    watch = GoodhartMonitor(
        gold=FunctionReward(vowels), every_n_steps=1, num_prompts=PROMPTS, max_new_tokens=5, rollouts=True
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=2,
        logger=CSVLogger(folder, name="online", version=0),
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, prompts(8, 8 // world), prompts(8, 8 // world))
    (folder / f"online.{trainer.global_rank}.json").write_text(json.dumps(watch.history))


def main(model_dir: str, world: int, folder: Path) -> None:
    """The whole run, one that goes on from its first epoch, and one whose rollouts are judged."""
    online(model_dir, world, folder)
    train(model_dir, world, folder, "whole", 2)
    train(model_dir, world, folder, "resumed", 2, folder / "whole_checkpoints" / "epoch=0.ckpt")
