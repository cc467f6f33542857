"""DeepSpeed on CPUs, and what it does beside the matrix's cells: see test_deepspeed."""

import os
from functools import partial

import lightning as L
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_rlhf.algorithms import DPO, PPO, SFT, Optimization, Update
from lightning_rlhf.algorithms.base import NonFiniteLossError
from lightning_rlhf.data.packing import pack
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models import LoRA, Policy, Quantization
from tests.algorithms.conftest import random_groups
from tests.algorithms.rollouts import Waves, prompts

SMALL = {"allgather_bucket_size": 1_000_000, "reduce_bucket_size": 1_000_000}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
CLIP = 0.01
SGD = Optimization(name="sgd", lr=0.5, schedule="constant")


class ZeroOnCPU(DeepSpeedStrategy):
    """Lightning's strategy, which would refuse all but CUDA; it keeps the norms of gradients."""

    def __init__(self, **settings):
        super().__init__(**{**SMALL, "exclude_frozen_parameters": True, **settings})
        self.norms = []

    @property
    def root_device(self):
        return torch.device("cpu", 0)  # DeepSpeed asks for its number

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def optimizer_step(self, *args, **kwargs):
        engine = self.deepspeed_engine
        steps = engine.global_steps
        done = super().optimizer_step(*args, **kwargs)
        if engine.global_steps > steps:  # of the sum of losses over all ranks, as for other strategies
            sums = self.optimizers[0].loss_scale * self.world_size
            self.norms.append(float(engine.get_global_grad_norm()) * sums)
        return done


class Start(Callback):
    """The trained weights as one vector, at the start and at the end."""

    def on_train_start(self, trainer, module):
        self.before = self.vector(module)

    def vector(self, module):
        return torch.cat([p.detach().float().flatten() for p in module.parameters() if p.requires_grad])


class Passes(Callback):
    """How many backwards there were."""

    count = 0

    def on_before_backward(self, trainer, module, loss):
        self.count += 1


class Broken(SFT):
    """Its losses are no numbers."""

    def losses(self, batch, stage):
        return super().losses(batch, stage) * float("nan")


def fit(module, loader, strategy="auto", *callbacks, **settings):
    """A Trainer that has fitted a module, and how the trained weights have moved."""
    L.seed_everything(0, verbose=False)
    start = Start()
    trainer = L.Trainer(
        devices=1 if strategy == "auto" else int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy,
        **QUIET,
        callbacks=[start, *callbacks],
        **settings,
    )
    trainer.fit(module, loader)
    return trainer, start.vector(module) - start.before


def validated(model_dir, strategy="auto"):
    """The loss on texts that nothing was learned from."""
    world = 1 if strategy == "auto" else int(os.environ.get("WORLD_SIZE", 1))
    trainer = L.Trainer(devices=world, strategy=strategy, **QUIET)
    (found,) = trainer.validate(SFT(model_dir), texts(8, 4 // world, world), verbose=False)
    return found["val/loss"]


def texts(count, batch_size, world=1):
    """Rows of unequal length, those of a step the same on any number of ranks and of micro-batches."""
    rows = random_groups(count, 1)
    sampler = DistributedSampler(rows, world, int(os.environ.get("RANK", 0)), shuffle=False)
    return DataLoader(rows, batch_size=batch_size, sampler=sampler, collate_fn=pack)


def accumulated(model_dir, strategy="auto", **settings):
    """Two steps of 8 rows: cut into two micro-batches on each of two ranks, or whole."""
    world = int(os.environ.get("WORLD_SIZE", 1)) if strategy != "auto" else 1
    window = settings.get("accumulate_grad_batches", 1)
    loader = texts(16, 8 // world // window, world)
    return fit(SFT(model_dir, optimization=SGD), loader, strategy, max_steps=2, **settings)[1]


def rollout_of(model_dir, **update):
    update = {"num_epochs": 1, "minibatch_size": 64, **update}
    how = Sampling(max_new_tokens=4, num_samples=2)
    return PPO(model_dir, Waves(), sampling=how, update=Update(**update), optimization=SGD)


def refused(module, loader, strategy, error=ValueError, **settings):
    """What an error says."""
    try:
        fit(module, loader, strategy, **{"max_steps": 1, **settings})
    except error as found:
        return str(found)
    return "nothing"


def cases(model_dir):
    """What the cells do not show, by name."""
    texts_of_two, small = partial(texts, world=2), partial(rollout_of, model_dir)
    sft = SFT(model_dir, optimization=SGD)
    clipped = (
        fit(sft, texts_of_two(4, 2), ZeroOnCPU(stage=1), max_steps=1, gradient_clip_val=CLIP),
        fit(small(max_grad_norm=CLIP), own_prompts(4), ZeroOnCPU(stage=2), max_steps=1),
        fit(small(max_grad_norm=None), own_prompts(4), ZeroOnCPU(stage=2), max_steps=1),
    )
    in_four_bits = Policy(model_dir, lora=LoRA(r=2), quantization=Quantization(compute_dtype="bfloat16"))
    passes, budget = Passes(), 12 + 30 * int(os.environ["RANK"])
    return {
        "by tokens": [
            fit(small(), own_prompts(4), ZeroOnCPU(stage=1), max_steps=1)[1],
            fit(small(micro_batch_tokens=budget), own_prompts(4), ZeroOnCPU(stage=1), passes, max_steps=1)[1],
        ],
        "micro-batches": passes.count,
        "validated": validated(model_dir, ZeroOnCPU()),
        "accumulated": [
            accumulated(model_dir, ZeroOnCPU(stage=stage), accumulate_grad_batches=2) for stage in (1, 2)
        ],
        "clipped": [float(moved.norm()) for _, moved in clipped],
        "refused": {
            "stage 3": refused(SFT(model_dir), texts_of_two(4, 2), ZeroOnCPU(stage=3)),
            "no ZeRO": refused(SFT(model_dir), texts_of_two(4, 2), ZeroOnCPU(zero_optimization=False)),
            "window": refused(SFT(model_dir), texts_of_two(6, 1), ZeroOnCPU(), accumulate_grad_batches=2),
            "reference": refused(
                DPO(Policy(model_dir, lora=LoRA(r=2)), reference=in_four_bits),
                texts_of_two(4, 2),
                ZeroOnCPU(),
            ),
            "tokens": refused(small(micro_batch_tokens=64), own_prompts(4), ZeroOnCPU()),
            "nan": refused(Broken(model_dir), texts_of_two(4, 2), ZeroOnCPU(), error=NonFiniteLossError),
        },
    }


def own_prompts(count):
    """A rank's own."""
    mine = prompts(count, seed=int(os.environ["RANK"]))
    sampler = DistributedSampler(mine.dataset, 1, 0)  # in the name of all ranks, so that Lightning leaves it
    return DataLoader(mine.dataset, batch_size=count, sampler=sampler, collate_fn=mine.collate_fn)
