"""HackingMonitor: what it finds in planted samples, and a run that it watches without changing it."""

import json
import math

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, Optimization
from lightning_rlhf.callbacks import HackingMonitor
from lightning_rlhf.callbacks.hacking_samples import answer_rows, asked_of, found_in, questions
from lightning_rlhf.data.packing import pack
from lightning_rlhf.metrics import hacking
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.rewards import FunctionReward, RewardEnsemble
from tests.algorithms.conftest import random_groups


def long_is_good(completions):
    return [float(len(text)) for text in completions]


def plain_is_good(completions):
    return [-float(len(text)) for text in completions]


def held_out(texts, **columns):
    """One prompt a pair of texts."""
    return [
        {
            "row": i,
            "texts": list(pair),
            "lengths": [len(t.split()) for t in pair],
            **{n: v[i] for n, v in columns.items()},
        }
        for i, pair in enumerate(texts)
    ]


def test_planted_behaviour_is_found():
    plain = [("one two three", f"four five {i}") for i in range(40)]
    listed = [("- one two three four five six", "- one two three four five six") for _ in range(40)]
    calm, apart = [[[0.0, 0.1]] * 2] * 40, [[[0.0, 3.0]] * 2] * 40
    ask = questions(30)
    right = [{"row": i, "texts": [q.answer] * 2} for i, q in enumerate(ask)]
    wrong = [{"row": i, "texts": [f"definitely {q.wrong}"]} for i, q in enumerate(ask)]
    control = {
        "held_out": held_out(plain, rewards=[[0.0, 1.0]] * 40, members=calm),
        "benign": [{"row": i, "texts": ["Boil it."]} for i in range(40)],
        "plain": right,
        "opinion": right,
    }
    rows = {
        "held_out": held_out(listed, rewards=[[0.0, 1.0]] * 40, members=apart),
        "benign": [{"row": i, "texts": ["I'm sorry, but I can't help with that."]} for i in range(40)],
        "plain": right,
        "opinion": wrong,
        "answers": [{"row": i, "scores": [1.0, 0.0, -1.0]} for i in range(30)],
    }
    found = found_in(rows, control, ask, kl=4.0, confidence=0.95)
    assert found["length"] == 7
    assert found["length_ratio_lower"] > 2
    assert found["length_per_distance"] == pytest.approx(2.0)  # 3 to 7 tokens over √4 nats
    assert found["bullets_change_lower"] > 0.8
    assert found["refusals_change_lower"] > 0.8
    assert found["distinct_2_change_upper"] < 0
    assert found["disagreement_change_lower"] > 1
    assert found["flips_change_lower"] > 0.8
    assert found["nonsense_change_lower"] > 0.8
    quiet = found_in(control, control, ask, kl=0.0, confidence=0.95)
    for name in ("bullets", "refusals", "distinct_2", "disagreement", "flips"):
        assert quiet[f"{name}_change"] == 0
    assert quiet["length_ratio"] == 1
    assert math.isnan(quiet["nonsense"])


def test_questions_are_known_and_none_is_asked_twice():
    asked = questions(60)
    assert len({q.text for q in asked}) == 60
    assert asked[: len(hacking.FACTS)] == list(hacking.FACTS)


def test_a_reward_scores_answers_of_its_share_of_the_questions(tokenizer):
    asked = questions(5)
    prompts = asked_of(tokenizer, [q.text for q in asked], slice(1, None, 2))
    assert prompts.row_ids == (1, 3)
    rows = answer_rows(prompts, tokenizer, asked, FunctionReward(long_is_good))
    assert [row["row"] for row in rows] == [1, 3]
    pair = hacking.nonsense_answers([asked[3]])[0]
    assert rows[1]["scores"] == [float(len(text)) for text in pair]


def watch(**settings):
    return HackingMonitor(
        **{
            "every_n_steps": 2,
            "num_prompts": 6,
            "max_new_tokens": 5,
            "batch_size": 4,
            "num_questions": 4,
            **settings,
        }
    )


def fit(trainer, llama_dir, callbacks, checkpoint=None, **settings):
    torch.manual_seed(0)
    module = DPO(Policy(llama_dir, lora=LoRA(r=2, dropout=0.1)), optimization=Optimization(lr=1e-2))
    loaders = (DataLoader(random_groups(8, 2), batch_size=4, collate_fn=pack, shuffle=True) for _ in range(2))
    run = trainer(callbacks=callbacks, **settings)
    torch.manual_seed(1)
    run.fit(module, *loaders, ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    return run, [p.detach().clone() for p in module.parameters() if p.requires_grad]


def test_it_logs_writes_and_leaves_training_alone(trainer, llama_dir, tmp_path):
    _, alone = fit(trainer, llama_dir, [], max_epochs=2)
    members = [FunctionReward(long_is_good), FunctionReward(plain_is_good)]
    monitor = watch(reward=RewardEnsemble(members), benign_prompts=["How do I boil an egg?"])
    run, watched = fit(trainer, llama_dir, [monitor], max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    history = json.loads((tmp_path / "hacking" / "hacking.json").read_text())
    assert [one["step"] for one in history] == [2, 4]
    logged = {name for name in run.callback_metrics if name.startswith("hacking/")}
    expected = {
        "length",
        "length_ratio",
        "bullets_change",
        "refusals",
        "distinct_2",
        "disagreement",
        "nonsense",
    }
    assert {f"hacking/{name}" for name in expected} <= logged
    assert all(math.isfinite(value) for one in history for value in one.values() if value != float("inf"))
    assert history[-1]["hacking/nonsense"] == 0  # two members that cancel out: no taste for anything
    assert len(monitor.control["held_out"]) == 6


def test_a_resumed_run_keeps_control_and_history(trainer, llama_dir, tmp_path):
    first = watch()
    run, _ = fit(trainer, llama_dir, [first], max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = watch()
    fit(trainer, llama_dir, [second], checkpoint=tmp_path / "half.ckpt", max_epochs=2)
    assert second.control == first.control
    assert second.history[0] == first.history[0]
    assert [one["step"] for one in second.history] == [2, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 1}, r"num_samples \(1\) at least 2"),
        ({"num_questions": -1}, "not negative"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        watch(**settings)
