"""Online algorithms learn: a sentiment reward on a real model, and sums checked by a rule."""

import gzip
import json
import math
import re

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf.algorithms import GAE, GRPO, PPO, RLOO, SFT, KLControl, Optimization, Update
from lightning_rlhf.data import PromptDataModule, SFTDataModule
from lightning_rlhf.generation import Sampling
from lightning_rlhf.rewards import FunctionReward
from tests.tokenizers import letters

NUM_TRAIN, NUM_VAL = 600, 64


@pytest.fixture(scope="module")
def stories(assets):
    with gzip.open(assets / "text" / "tinystories_train.jsonl.gz", "rt") as lines:
        prompts = [" ".join(json.loads(line)["text"].split()[:6]) for line in lines]
    rows = [{"prompt": prompt} for prompt in prompts]
    return Dataset.from_list(rows[:NUM_TRAIN]), Dataset.from_list(rows[NUM_TRAIN : NUM_TRAIN + NUM_VAL])


@pytest.fixture(scope="module")
def sentiment(assets):
    """tanh(sum of VADER valences / 4): 1 at most."""
    with gzip.open(assets / "rewards" / "vader_lexicon.txt.gz", "rt") as lines:
        valence = {word: float(value) for word, value, *_ in (line.split("\t") for line in lines)}

    def score(completions):
        words = [re.findall(r"[a-z']+", text.lower()) for text in completions]
        return [math.tanh(sum(valence.get(word, 0.0) for word in several) / 4) for several in words]

    return FunctionReward(score, name="sentiment")


@pytest.mark.parametrize(
    ("estimator", "num_samples", "num_epochs", "num_rollouts"),
    [
        pytest.param(RLOO(), 4, 2, 24, id="rloo"),
        pytest.param(GRPO(), 4, 2, 24, id="grpo", marks=pytest.mark.slow),
        pytest.param(GAE(), 1, 4, 20, id="gae", marks=pytest.mark.slow),
    ],
)
def test_a_real_model_writes_what_the_reward_likes(
    estimator, num_samples, num_epochs, num_rollouts, assets, stories, sentiment, trainer
):
    torch.manual_seed(0)
    module = PPO(
        str(assets / "stories260K-hf"),
        sentiment,
        sampling=Sampling(max_new_tokens=48, num_samples=num_samples, batch_size=64),
        estimator=estimator,
        kl=KLControl(coef=0.03),
        update=Update(num_epochs=num_epochs, minibatch_size=16),
        optimization=Optimization(lr=3e-4, schedule="constant_with_warmup", warmup_ratio=0.05, eps=1e-5),
        value_lr=1e-3 if estimator.needs_values else None,
    )
    train, val = stories
    data = PromptDataModule(train, val=val, batch_size=64 // num_samples, max_length=200)
    run = trainer(max_epochs=-1, max_steps=num_rollouts * num_epochs * 4, limit_val_batches=0)
    run.fit(module, datamodule=data)
    found = trainer().validate(module, datamodule=data, verbose=False)[0]
    for row in module.last_validation[:10]:
        print(f"{row['score']:.2f}  {row['prompt']}|{row['completion']}".replace("\n", " "))
    assert found["val/objective/scores"] > 0.9
    assert 1.0 < found["val/objective/kl"] < 15.0


def right(completions, answer):
    return [float(text.strip() == str(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def test_a_rule_reward_teaches_sums(trainer):
    """A model that adds digits right about half of the time gets better from a reward that only says right or wrong."""
    torch.manual_seed(0)
    tokenizer = letters()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    sums = [
        {"prompt": f"{a} {b}:", "completion": str(a + b), "answer": a + b}
        for a in range(10)
        for b in range(10)
    ]
    rows = Dataset.from_list(sums)
    trainer(max_epochs=-1, max_steps=180).fit(
        SFT(model, tokenizer, optimization=Optimization(lr=3e-3, schedule="constant")),
        datamodule=SFTDataModule(
            Dataset.from_list([{k: r[k] for k in ("prompt", "completion")} for r in sums]), batch_size=32
        ),
    )
    module = PPO(
        model,
        FunctionReward(right, name="right"),
        tokenizer,
        sampling=Sampling(max_new_tokens=4, num_samples=8),
        estimator=GRPO(),
        kl=KLControl(coef=0.0),
        update=Update(num_epochs=1, minibatch_size=128),
        optimization=Optimization(lr=3e-3, schedule="cosine"),
    )
    data = PromptDataModule(rows, val=rows, batch_size=32)
    before = trainer().validate(module, datamodule=data, verbose=False)[0]["val/rewards/right"]
    trainer(max_epochs=-1, max_steps=160, limit_val_batches=0).fit(module, datamodule=data)
    after = trainer().validate(module, datamodule=data, verbose=False)[0]["val/rewards/right"]
    print(f"right: {before:.2f} before, {after:.2f} after")
    assert 0.2 < before < 0.8
    assert after > before + 0.15
