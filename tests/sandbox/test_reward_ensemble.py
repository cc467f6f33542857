"""Reward models trained apart on the sandbox agree where they were trained, and less on text of another kind."""

import random

import lightning as L
import pytest
import torch
from datasets import Dataset

from lightning_rlhf.algorithms import Optimization, RewardModel
from lightning_rlhf.data import PreferenceDataModule
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.sandbox import Annotator, World, build_policy, build_tokenizer


@pytest.fixture(scope="module")
def world():
    return World(seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def ensemble(world, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_policy(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    annotator = Annotator(world)
    L.seed_everything(0, verbose=False)
    module = RewardModel(
        str(folder), num_members=4, member_share=0.8, optimization=Optimization(lr=1e-3, warmup_ratio=0.1)
    )
    data = PreferenceDataModule(
        Dataset.from_list(world.preferences(800, annotator)),
        val=Dataset.from_list(world.preferences(200, annotator, "val")),
        batch_size=16,
    )
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/accuracy"] > 0.55
    return module.ensemble.eval()


@torch.no_grad()
def disagreement(ensemble, tokenizer, prompts, completions):
    """Standard deviation over the members' normalised scores, a completion each."""
    ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in completions]
    batch = pack(
        PromptGroup(tokenizer(p).input_ids, [tokens]) for p, tokens in zip(prompts, ids, strict=True)
    )
    return ensemble.normalized(ensemble.raw(batch)).std(0, correction=0)


def test_members_disagree_more_on_text_of_another_kind(ensemble, world, tokenizer):
    rng = random.Random(0)
    words = [tokenizer.decode([token]) for token in range(4, len(tokenizer))]
    prompts, answers, _ = zip(*world.pairs(200, "val", seed=3), strict=True)
    known = disagreement(ensemble, tokenizer, prompts, answers)
    for strange in (
        ["".join(rng.choice(words) for _ in tokenizer(answer).input_ids) for answer in answers],
        [" ".join([answer] * 3) for answer in answers],
    ):
        more = disagreement(ensemble, tokenizer, prompts, strange) - known
        assert more.mean() > 3 * more.std() / len(more) ** 0.5
        assert more.mean() > 0.1 * known.mean()
