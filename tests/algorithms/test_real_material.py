"""On a real pretrained model and real text: what must get better does."""

import gzip
import random
import re

import lightning as L
import pytest
from datasets import Dataset

from lightning_rlhf.algorithms import DPO, KTO, SFT, Optimization, RewardModel
from lightning_rlhf.data import PreferenceDataModule, SFTDataModule, UnpairedDataModule, load_rows
from lightning_rlhf.functional import wilson_interval


def test_sft_lowers_the_perplexity_of_held_out_stories(assets, trainer):
    stories = {split: str(assets / f"text/tinystories_{split}.jsonl.gz") for split in ("train", "test")}
    data = SFTDataModule(stories["train"], val=stories["test"], batch_size=8, max_length=512)
    module = SFT(str(assets / "stories260K-hf"), optimization=Optimization(lr=3e-4))
    run = trainer(limit_train_batches=12, limit_val_batches=4)
    before = run.validate(module, data, verbose=False)[0]["val/perplexity"]
    run.fit(module, datamodule=data)
    after = run.callback_metrics["val/perplexity"].item()
    assert before == pytest.approx(4.3, abs=0.3)  # what the material's description says
    assert after < 0.99 * before


def test_dpo_accuracy_rises_on_real_pairs(assets, trainer):
    pairs = load_rows(str(assets / "preferences/hh_helpful_train.jsonl.gz")).select(range(32))
    data = PreferenceDataModule(pairs, batch_size=16, max_length=256, max_prompt_length=128)
    module = DPO(str(assets / "stories260K-hf"), optimization=Optimization(lr=1e-3))
    run = trainer(max_epochs=6)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["train/rewards/accuracies"] > 0.8


def test_kto_margins_rise_on_real_pairs_that_were_unpaired(assets, trainer):
    pairs = load_rows(str(assets / "preferences/hh_helpful_train.jsonl.gz")).select(range(8))
    data = UnpairedDataModule(pairs, batch_size=16, max_length=256, max_prompt_length=128)
    module = KTO(str(assets / "stories260K-hf"), optimization=Optimization(lr=1e-3))
    run = trainer(max_epochs=6)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["train/rewards/margins"] > 0.5
    assert run.callback_metrics["train/loss"] < 0.48


@pytest.fixture
def valence(assets):
    """A text's gold reward: the sum of its words' valences in a lexicon that people made."""
    with gzip.open(assets / "rewards/vader_lexicon.txt.gz", "rt") as file:
        lexicon = {word: float(value) for word, value, *_ in (line.split("\t") for line in file)}
    return lambda text: sum(lexicon.get(word, 0.0) for word in re.findall(r"[a-z']+", text.lower()))


def lexicon_pairs(stories, count, valence):
    """Two sentences of each of two stories after the opening of a third; the more cheerful are chosen."""
    draw = random.Random(0)
    sentences = [re.split(r"(?<=[.!?])\s+", story) for story in load_rows(str(stories))["text"]]
    pieces = [f" {' '.join(s[i : i + 2])}" for s in sentences for i in range(1, len(s) - 1, 2)]
    rows = []
    while len(rows) < count:
        worse, better = sorted(draw.sample(pieces, 2), key=valence)
        if valence(worse) < valence(better):
            rows.append({"prompt": draw.choice(sentences)[0], "chosen": better, "rejected": worse})
    return Dataset.from_list(rows)


def test_a_reward_model_learns_the_labels_of_a_lexicon(assets, trainer, valence):
    data = PreferenceDataModule(
        lexicon_pairs(assets / "text/tinystories_train.jsonl.gz", 1500, valence),
        val=lexicon_pairs(assets / "text/tinystories_test.jsonl.gz", 600, valence),
        batch_size=16,
    )
    L.seed_everything(0, verbose=False)
    optimization = Optimization(lr=1e-3, warmup_ratio=0.1)
    run = trainer(max_epochs=1, gradient_clip_val=1.0)
    run.fit(RewardModel(str(assets / "stories260K-hf"), optimization=optimization), datamodule=data)
    accuracy = run.callback_metrics["val/accuracy"].item()
    lower, _ = wilson_interval(accuracy * 600, 600)
    assert lower > 0.62, accuracy
    assert lower > run.callback_metrics["val/longer_wins"].item()
