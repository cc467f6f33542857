"""A TRL user's data set runs unchanged in each algorithm, tokenised to the ids that TRL's trainer makes of it."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf.algorithms import DPO, KTO, SFT, RewardModel
from lightning_rlhf.data import PreferenceDataModule, SFTDataModule, UnpairedDataModule
from tests.algorithms.conftest import Gradients
from tests.data.conftest import MARKED, make_tokenizer
from tests.data.test_against_trl import by_trl, trl

PROMPTS = ["the sky is", "what is this?", "and the sea", "Human: why"]
CHOSEN = [" blue", " it is a cat", " green", " because"]
REJECTED = [" red", " a dog", " black", " no"]
# What real data sets have beside: numbers, texts, lists, a column of nothing, one that another format knows.
EXTRA = {
    "id": [7, 8, 9, 10],
    "prompt_id": ["a", "b", "c", "d"],
    "source": ["web", "web", "book", None],
    "score_chosen": [8.5, 7.0, 9.0, 6.0],
    "score_rejected": [2.0, 6.5, 3.0, 6.0],
    "tags": [["x"], [], ["y", "z"], ["x"]],
    "note": [None] * 4,
    "meta": [{"lang": "en", "n": n} for n in range(4)],
}
MESSAGES = {"messages": [[{"role": "user", "content": "another text"}]] * 4}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=MARKED)


def turn(role, text):
    return [{"role": role, "content": text}]


def columns(conversational):
    """Prompts, chosen and rejected answers, of one kind; the second conversation has an earlier turn and a system."""
    if not conversational:
        return PROMPTS, CHOSEN, REJECTED
    prompts = [turn("user", text) for text in PROMPTS]
    prompts[1] = [
        *turn("system", "be brief"),
        *turn("user", "hi"),
        *turn("assistant", "ho"),
        *turn("user", "why"),
    ]
    return prompts, *([turn("assistant", text) for text in side] for side in (CHOSEN, REJECTED))


def preference(conversational, explicit):
    prompts, chosen, rejected = columns(conversational)
    if explicit:
        return {"prompt": prompts, "chosen": chosen, "rejected": rejected}
    return {
        name: [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        for name, answers in (("chosen", chosen), ("rejected", rejected))
    }


def unpaired_preference(conversational):
    prompts, chosen, _ = columns(conversational)
    return {"prompt": prompts, "completion": chosen, "label": [True, False, False, True]}


def prompt_completion(conversational):
    prompts, chosen, _ = columns(conversational)
    return {"prompt": prompts, "completion": chosen}


def language_modeling(conversational):
    wholes = preference(conversational, explicit=False)["chosen"]
    return {"messages" if conversational else "text": wholes}


def run_one_step(algorithm, data, tokenizer, trainer):
    """One optimizer step in a stock Trainer; the tokenised rows."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    gradients = Gradients()
    run = trainer(max_steps=1, callbacks=[gradients])
    run.fit(algorithm(model, tokenizer), datamodule=data)
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert gradients.steps[0].norm() > 0
    return data.datasets["train"].to_list()


def with_extra(rows, extra):
    """The data that a user has, and the same without what confuses TRL itself (``messages`` beside another format)."""
    rows = {**rows, **(EXTRA if extra else {})}
    everything = {**rows, **(MESSAGES if extra and "prompt" in rows or "chosen" in rows else {})}
    return Dataset.from_dict(everything), Dataset.from_dict(rows)


both = pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
prompts = pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "implicit"])
extras = pytest.mark.parametrize("extra", [False, True], ids=["bare", "extra"])


@both
@prompts
@extras
@pytest.mark.parametrize("algorithm", [DPO, RewardModel])
def test_preference(algorithm, conversational, explicit, extra, tokenizer, trainer):
    data, plain = with_extra(preference(conversational, explicit), extra)
    ours = run_one_step(algorithm, PreferenceDataModule(data), tokenizer, trainer)
    if algorithm is RewardModel:
        theirs = by_trl(trl.RewardTrainer, plain, tokenizer)
        expected = [[row["chosen_ids"], row["rejected_ids"]] for row in theirs]
    else:
        theirs = by_trl(trl.DPOTrainer, plain, tokenizer)
        expected = [
            [row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]] for row in theirs
        ]
        assert [row["prompt_ids"] for row in ours] == [row["prompt_ids"] for row in theirs]
    assert [
        [row["prompt_ids"] + completion for completion in row["completion_ids"]] for row in ours
    ] == expected


@both
@extras
@pytest.mark.parametrize("form", ["labelled", "explicit", "implicit"])
def test_unpaired_preference(form, conversational, extra, tokenizer, trainer):
    rows = (
        unpaired_preference(conversational)
        if form == "labelled"
        else preference(conversational, form == "explicit")
    )
    data, plain = with_extra(rows, extra)
    ours = run_one_step(KTO, UnpairedDataModule(data), tokenizer, trainer)
    found = [(row["prompt_ids"], row["completion_ids"][0], row["label"] == 1) for row in ours]
    theirs = by_trl(trl.KTOTrainer, plain, tokenizer)
    # TRL puts all chosen answers of a batch before all rejected ones.
    assert sorted(found) == sorted((row["prompt_ids"], row["completion_ids"], row["label"]) for row in theirs)


@both
@extras
def test_prompt_completion(conversational, extra, tokenizer, trainer):
    data, plain = with_extra(prompt_completion(conversational), extra)
    ours = run_one_step(SFT, SFTDataModule(data), tokenizer, trainer)
    theirs = by_trl(trl.SFTTrainer, plain, tokenizer)
    for one, other in zip(ours, theirs, strict=True):
        assert one["prompt_ids"] + one["completion_ids"][0] == other["input_ids"]
        assert len(one["prompt_ids"]) == other["completion_mask"].index(1)


@both
@extras
@pytest.mark.parametrize("bos", [False, True])
def test_language_modeling(bos, conversational, extra, trainer):
    """TRL learns all tokens of ``messages`` unless told otherwise; ``loss_on="all"`` does so here.

    Where the tokenizer has a BOS but does not put it before a text, TRL has none and does not learn the first token.
    """
    tokenizer = make_tokenizer(add_bos=bos, chat_template=MARKED)
    data, plain = with_extra(language_modeling(conversational), extra)
    ours = run_one_step(SFT, SFTDataModule(data, loss_on="all"), tokenizer, trainer)
    start = [] if bos or conversational else [tokenizer.bos_token_id]
    for one, other in zip(ours, by_trl(trl.SFTTrainer, plain, tokenizer), strict=True):
        assert one["prompt_ids"] + one["completion_ids"][0] == start + other["input_ids"]
        assert len(one["prompt_ids"]) == 1
        assert one["completion_masks"] is None


@extras
def test_assistant_turns(extra, tokenizer, trainer):
    """The default of ``messages`` is TRL's ``assistant_only_loss``."""
    data, plain = with_extra(language_modeling(True), extra)
    ours = run_one_step(SFT, SFTDataModule(data), tokenizer, trainer)
    theirs = by_trl(trl.SFTTrainer, plain, tokenizer, assistant_only_loss=True)
    for one, other in zip(ours, theirs, strict=True):
        ids = one["prompt_ids"] + one["completion_ids"][0]
        counted = [False] * len(one["prompt_ids"]) + one["completion_masks"][0]
        labels = [token if counts else -100 for token, counts in zip(ids, counted, strict=True)]
        assert ids == other["input_ids"][: len(ids)]
        assert labels + [-100] * (len(other["labels"]) - len(labels)) == other["labels"]


def test_margins_travel_to_a_reward_model(tokenizer, trainer):
    data, plain = with_extra({**preference(True, True), "margin": [0.5, 1.0, 0.0, 2.0]}, extra=True)
    ours = run_one_step(RewardModel, PreferenceDataModule(data), tokenizer, trainer)
    theirs = by_trl(trl.RewardTrainer, plain, tokenizer)
    assert [row["margin"] for row in ours] == theirs["margin"]
