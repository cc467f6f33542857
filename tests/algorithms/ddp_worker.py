"""One process of a DDP run on the CPU: writes its weights and gradients. Run by test_ddp.py."""

import os
from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, KTO, SFT, OnlineDPO, Optimization, RewardModel, TokenHead
from lightning_rlhf.data.packing import pack
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.objectives import BCO
from tests.algorithms.conftest import Gradients, away_from, labelled, random_groups
from tests.algorithms.test_online_dpo import Ids, prompts
from tests.models.families import tiny


def main(algorithm: str, model_dir: str, lora: str, world: int, output: str) -> None:
    torch.manual_seed(0)
    policy = Policy(model_dir, lora=LoRA(r=2, init="gaussian") if lora == "lora" else None)
    settings = Optimization(name="sgd", lr=1e-2, schedule="constant")
    modules = {
        "SFT": SFT,
        "DPO": DPO,
        "BCO": partial(DPO, objective=BCO(beta=1.0)),
        "KTO": KTO,
        "RewardModel": partial(RewardModel, num_members=2, member_share=0.7),
        "TokenHead": partial(RewardModel, num_members=2, member_share=0.7, token_head=TokenHead()),
        "OnlineDPO": partial(OnlineDPO, reward=Ids(), sampling=Sampling(max_new_tokens=6, num_samples=3)),
    }
    module = modules[algorithm](policy, optimization=settings)
    points: list[torch.Tensor] = []
    if algorithm == "KTO":
        # Another reference than the policy, so that the reference point is not 0 at the first step.
        module = KTO(
            policy, optimization=settings, reference=other_model(f"{output}.reference.{os.getpid()}")
        )
        torch.manual_seed(0)  # making that model drew random numbers, and adapters are drawn later
        point = module.reference_point
        module.reference_point = lambda *logps: points.append(point(*logps)) or points[-1]
    seen = Gradients()
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
    groups = labelled(8) if algorithm == "KTO" else random_groups(8, 1 if algorithm == "SFT" else 2)
    # One process sees all eight rows at once, two see four each: the same optimizer steps.
    loader = DataLoader(groups, batch_size=8 // world, collate_fn=pack)
    if algorithm == "OnlineDPO":
        loader = prompts(8, 8 // world)
    trainer.fit(module, loader, loader)
    weights = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "time/" not in name}
    found = {"gradients": seen.steps, "weights": weights, "metrics": metrics, "points": points}
    torch.save(found, f"{output}.{trainer.global_rank}")


def other_model(path: str) -> str:
    away_from(tiny("LlamaConfig"), scale=0.05).save_pretrained(path)
    return path
