"""One process of a DDP run on the CPU: writes its weights and gradients. Run by test_ddp.py."""

import sys

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, SFT, Optimization
from lightning_rlhf.data.packing import pack
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.objectives import BCO, Sigmoid
from tests.algorithms.conftest import Gradients, random_groups

OBJECTIVES = {"DPO": Sigmoid(), "BCO": BCO(beta=1.0)}


def main(algorithm: str, model_dir: str, lora: str, devices: str, output: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = Policy(model_dir, lora=LoRA(r=2, init="gaussian") if lora == "lora" else None)
    settings = Optimization(name="sgd", lr=1e-2, schedule="constant")
    if algorithm == "SFT":
        module = SFT(policy, optimization=settings)
    else:
        module = DPO(policy, optimization=settings, objective=OBJECTIVES[algorithm])
    seen = Gradients()
    world = int(devices)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=2,
        callbacks=[seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    groups = random_groups(8, 1 if algorithm == "SFT" else 2)
    # One process sees all eight rows at once, two see four each: the same optimizer steps.
    loader = DataLoader(groups, batch_size=8 // world, collate_fn=pack)
    trainer.fit(module, loader, loader)
    weights = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save(
        {"gradients": seen.steps, "weights": weights, "metrics": metrics}, f"{output}.{trainer.global_rank}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
