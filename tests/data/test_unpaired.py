"""Labelled answers, and the mismatched completions beside them."""

import json
import random

import lightning as L
import numpy as np
import pytest
import torch
from datasets import Dataset

from lightning_rlhf.data import PackCollator, UnpairedDataModule, tokenize_unpaired
from lightning_rlhf.data.formats import BadRow, read_example, recognise
from lightning_rlhf.data.mismatch import mismatch
from tests.data.conftest import make_tokenizer
from tests.data.test_datamodules import Recorder

LABELLED = ("prompt", "completion", "label")
USER = {"role": "user", "content": "hi"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS = [{"prompt": a, "completion": a * (1 + i % 4), "label": i % 3 > 0} for i, a in enumerate(LETTERS)]


def says(text):
    return [{"role": "assistant", "content": text}]


def rows(*labels, **columns):
    count = len(labels)
    made = {"prompt": list(LETTERS[:count]), "completion": list(LETTERS[-count:]), "label": list(labels)}
    return Dataset.from_dict({**made, **columns})


# --- partners ---------------------------------------------------------------------------------------------------------


def conflicts(prompts, completions, partner):
    p, c = np.array(prompts), np.array(completions)
    return int(((p == p[partner]) | (c == c[partner])).sum())


@pytest.mark.parametrize("seed", range(20))
def test_a_partner_has_another_prompt_and_another_completion(seed):
    draw = random.Random(seed)
    count = draw.randint(4, 60)
    prompts = [draw.randrange(count // 2) for _ in range(count)]
    prompts[:2] = [0, 1]
    prompts = np.unique(prompts, return_inverse=True)[1].tolist()
    completions = [draw.randrange(count // 3 + 2) for _ in range(count)]
    partner = mismatch(prompts, completions, seed=seed)
    assert conflicts(prompts, completions, partner) == 0
    assert partner.tolist() == mismatch(prompts, completions, seed=seed).tolist()


@pytest.mark.parametrize("count", [2, 3, 8, 101])
def test_pairs_unpaired_get_a_permutation(count):
    """Two rows a prompt, all completions different: every completion is taken once."""
    prompts = [row // 2 for row in range(2 * count)]
    partner = mismatch(prompts, list(range(2 * count)), seed=3)
    assert conflicts(prompts, list(range(2 * count)), partner) == 0
    assert sorted(partner.tolist()) == list(range(2 * count))


def test_another_seed_gives_other_partners():
    found = {tuple(mismatch(range(30), range(30), seed=seed).tolist()) for seed in range(5)}
    assert len(found) == 5


def test_equal_answers_to_different_prompts_are_exchanged_without_loss():
    """Half the answers are the same "yes": still a permutation, and never "yes" beside "yes"."""
    prompts, completions = list(range(20)), [0] * 10 + list(range(1, 11))
    partner = mismatch(prompts, completions, seed=0)
    assert conflicts(prompts, completions, partner) == 0
    assert sorted(partner.tolist()) == prompts


def test_a_prompt_with_most_of_the_rows_takes_completions_twice():
    prompts = [0] * 8 + [1, 2]
    partner = mismatch(prompts, list(range(10)), seed=0)
    assert conflicts(prompts, list(range(10)), partner) == 0
    assert set(partner[:8].tolist()) == {8, 9}


def test_no_partner_is_an_error():
    with pytest.raises(ValueError, match="all 3 rows have the same prompt"):
        mismatch([0, 0, 0], [0, 1, 2], seed=0)
    with pytest.raises(ValueError, match="no row with another prompt has another completion"):
        mismatch([0, 1, 2], [0, 0, 0], seed=0)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "value"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0)])
def test_labels(label, value):
    example = read_example({"prompt": "a", "completion": "b", "label": label}, LABELLED)
    assert example.extras == {"label": value}


@pytest.mark.parametrize(
    ("label", "reason", "message"),
    [
        (
            "true",
            "wrong type",
            "column 'label' is 'true', of type str; it must be true or false, or 1 or 0: con",
        ),
        (None, "missing value", "column 'label' has no value"),
        (2, "wrong label", "column 'label' is 2; it must be true or false"),
        (-1, "wrong label", "column 'label' is -1"),
        (float("nan"), "wrong label", "column 'label' is nan"),
        ([True], "wrong type", "of type list"),
    ],
)
def test_bad_labels(label, reason, message):
    with pytest.raises(BadRow, match=message) as error:
        read_example({"prompt": "a", "completion": "b", "label": label}, LABELLED)
    assert error.value.reason == reason


def test_columns_are_recognised_and_other_data_is_named():
    assert recognise(["label", "prompt", "completion", "id"], "unpaired") == LABELLED
    assert recognise(["chosen", "rejected"], "unpaired") == ("chosen", "rejected")
    with pytest.raises(ValueError, match=r"prompt . completion . label, or .*use SFTDataModule"):
        recognise(["prompt", "completion"], "unpaired")
    with pytest.raises(ValueError, match="columns of unpaired preference data: use UnpairedDataModule"):
        recognise(["prompt", "completion", "label"], "preference")


def test_strings_name_row_and_remedy(tokenizer):
    with pytest.raises(ValueError, match="the Dataset, row 1: column 'label' is 'True'.*convert it"):
        tokenize_unpaired(rows("True", "False"), tokenizer)


@pytest.mark.parametrize("labels", [(True, True, True), (0, 0, 0)])
def test_labels_of_one_kind_are_refused_with_their_number(tokenizer, labels):
    good = sum(labels)
    message = f"the Dataset.*: {good} desirable and {3 - good} undesirable answers"
    with pytest.raises(ValueError, match=message):
        tokenize_unpaired(rows(*labels), tokenizer)
    with pytest.raises(ValueError, match=message):
        UnpairedDataModule(rows(*labels), tokenizer=tokenizer).setup("fit")


def test_one_prompt_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="the Dataset: all 2 rows have the same prompt"):
        tokenize_unpaired(rows(True, False, prompt=["a", "a"]), tokenizer)


def test_groups_hold_the_labelled_answer_and_another_prompts(tokenizer):
    made, report = tokenize_unpaired(Dataset.from_list(ROWS), tokenizer)
    own = [tokenizer.decode(ids[0][:-1]) for ids in made["completion_ids"]]
    other = [tokenizer.decode(ids[1][:-1]) for ids in made["completion_ids"]]
    assert own == [row["completion"] for row in ROWS]
    assert sorted(other) == sorted(own)
    assert all(row["prompt"] not in text for row, text in zip(ROWS, other, strict=True))
    assert made["num_tokens"] == [
        len(p) + sum(map(len, c)) for p, c in zip(made["prompt_ids"], made["completion_ids"], strict=True)
    ]
    assert report.tokens == sum(made["num_tokens"])
    assert "17 desirable and 9 undesirable answers" in str(report)
    batch = PackCollator()(made[:5])
    assert batch.extras["label"].tolist() == [0, 1, 1, 0, 1]
    assert [len(lengths) for lengths in batch.completion_lengths] == [2] * 5


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("implicit", [False, True])
def test_pairs_are_unpaired(chat, conversational, implicit):
    pairs = []
    for letter in "abcd":
        if conversational:
            prompt, chosen, rejected = [{**USER, "content": letter}], says("yes " + letter), says("no")
        else:
            prompt, chosen, rejected = f"say {letter}:", f" yes {letter}", " no"
        whole = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        pairs.append(whole if implicit else {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    made, report = tokenize_unpaired(Dataset.from_list(pairs), chat)
    assert made["label"] == [1.0, 0.0] * 4
    assert made["source_row"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert made["row_id"] == list(range(8))
    assert report.rows == 4
    for index, row in enumerate(made):
        prompt, own, other = map(chat.decode, [row["prompt_ids"], *row["completion_ids"]])
        letter = "abcd"[index // 2]
        assert letter in prompt
        assert own.strip().startswith("no" if index % 2 else f"yes {letter}")
        assert own != other


def test_a_bad_pair_is_dropped_once(tokenizer):
    """Both halves are too long for their prompt: one row, one count."""
    pairs = [{"prompt": c * n, "chosen": c, "rejected": c + c} for c, n in (("a", 1), ("b", 90), ("c", 1))]
    made, report = tokenize_unpaired(Dataset.from_list(pairs), tokenizer, max_length=8, on_bad_row="drop")
    assert report.dropped == {"prompt too long": 1}
    assert made["source_row"] == [0, 0, 2, 2]


def test_limits_hold_for_mismatched_completions_too(tokenizer):
    data = [
        {"prompt": c * (1 + 5 * (i % 2)), "completion": c.upper() * 9, "label": i % 2}
        for i, c in enumerate("abcdef")
    ]
    made, _ = tokenize_unpaired(Dataset.from_list(data), tokenizer, max_length=8)
    lengths = [
        (len(p), [len(x) for x in c]) for p, c in zip(made["prompt_ids"], made["completion_ids"], strict=True)
    ]
    assert all(prompt + max(completions) <= 8 for prompt, completions in lengths)
    assert all(len(set(map(tuple, c))) == 2 for c in made["completion_ids"])
    assert any(prompt + completions[1] == 8 for prompt, completions in lengths)


# --- the datamodule ---------------------------------------------------------------------------------------------------


def test_batches_of_any_size_hold_the_same_groups(tokenizer):
    """Partners do not depend on the batch: batches of one and a last batch of one have them too."""
    groups = {}
    for batch_size in (1, 5, 26):
        data = UnpairedDataModule(Dataset.from_list(ROWS), tokenizer=tokenizer, batch_size=batch_size, seed=4)
        data.setup("fit")
        for batch in data.train_dataloader():
            assert batch.num_completions == 2 * batch.num_groups
        groups[batch_size] = data.datasets["train"].to_list()
    assert groups[1] == groups[5] == groups[26]
    other = UnpairedDataModule(Dataset.from_list(ROWS), tokenizer=tokenizer, seed=5)
    other.setup("fit")
    assert other.datasets["train"].to_list() != groups[1]


def test_from_a_file_it_is_cached_and_the_same(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = []
    for _ in range(2):
        data = UnpairedDataModule(str(path), tokenizer=make_tokenizer())
        data.setup("fit")
        found.append(
            (data.datasets["train"].to_list(), data.fingerprint("train"), data.datasets["train"]._fingerprint)
        )
    assert found[0] == found[1]
    assert [row["row_id"] for row in found[0][0]] == list(range(26))


def test_in_a_trainer(tokenizer, tmp_path):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    run = L.Trainer(default_root_dir=tmp_path, max_epochs=1, num_sanity_val_steps=0, **quiet)
    module = Recorder(tokenizer)
    data = UnpairedDataModule(
        Dataset.from_list(ROWS), predict=rows(True), val_fraction=0.25, columns=None, batch_size=4
    )
    run.fit(module, datamodule=data)
    assert sorted(row for _, rows in module.seen for row in rows) == list(range(20))
    assert sorted(module.evaluated) == list(range(6))
    assert torch.cat(run.predict(module, datamodule=data)).tolist() == [
        0
    ]  # one row, one label, nothing mismatched
    assert len(data.datasets["predict"][0]["completion_ids"]) == 1


def test_without_mismatched_completions(tokenizer):
    data = UnpairedDataModule(Dataset.from_list(ROWS), tokenizer=tokenizer, mismatched=False)
    data.setup("fit")
    assert all(len(ids) == 1 for ids in data.datasets["train"]["completion_ids"])
