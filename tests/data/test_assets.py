"""Real data and tokenizers."""

import pytest
import torch
from transformers import AutoTokenizer

from lightning_rlhf.data import PreferenceDataModule, SFTDataModule, UnpairedDataModule


@pytest.fixture
def gpt2(assets):
    return AutoTokenizer.from_pretrained(assets / "gpt2-tokenizer")


@pytest.fixture
def stories(assets):
    return AutoTokenizer.from_pretrained(assets / "stories260K-hf")


def test_pairs_that_cannot_be_used(assets, gpt2):
    path = str(assets / "preferences" / "hh_edge_cases.jsonl.gz")
    with pytest.raises(
        ValueError, match=r"hh_edge_cases\.jsonl\.gz, row 1: 'chosen' and 'rejected' are identical"
    ):
        PreferenceDataModule(path, tokenizer=gpt2).setup("fit")
    with pytest.raises(ValueError, match=r"31 dropped \(28 identical pair, 3 empty completion\)"):
        PreferenceDataModule(path, tokenizer=gpt2, on_bad_row="drop").setup("fit")


def test_a_tokenizer_without_pad(assets, gpt2):
    assert gpt2.pad_token is None
    path = str(assets / "preferences" / "hh_helpful_test.jsonl.gz")
    datamodule = PreferenceDataModule(path, tokenizer=gpt2, on_bad_row="drop", max_prompt_length=512)
    datamodule.setup("fit")
    batch = next(iter(datamodule.evaluation_loader("train")))
    end = torch.tensor(batch.num_targets).cumsum(0) - 1
    assert (batch.targets[end] == gpt2.eos_token_id).all()
    assert (batch.targets == gpt2.eos_token_id).sum() == batch.num_completions
    for row in datamodule.datasets["train"].select(range(20)):
        assert gpt2.decode(row["prompt_ids"]).endswith("\n\nAssistant:")


def test_eos_that_is_bos(assets, stories):
    assert stories.eos_token_id == stories.bos_token_id == 1
    path = str(assets / "text" / "tinystories_test.jsonl.gz")
    datamodule = SFTDataModule(path, tokenizer=stories, max_length=None)
    datamodule.setup("fit")
    for row in datamodule.datasets["train"]:
        assert row["prompt_ids"] == [1]
        assert row["completion_ids"][0][0] != 1
        assert row["completion_ids"][0][-1] == 1
        assert row["completion_ids"][0].count(1) == 1


def test_worked_answers_by_renamed_columns(assets, gpt2):
    columns = {"question": "prompt", "answer": "completion"}
    datamodule = SFTDataModule(str(assets / "sft" / "gsm8k_test.jsonl.gz"), tokenizer=gpt2, columns=columns)
    datamodule.setup("fit")
    assert datamodule.report["train"].dropped == {}
    assert "####" in gpt2.decode(datamodule.datasets["train"][0]["completion_ids"][0])
    with pytest.raises(ValueError, match="has the columns .*question, answer.* a datamodule's columns="):
        SFTDataModule(str(assets / "sft" / "gsm8k_test.jsonl.gz"), tokenizer=gpt2).setup("fit")


def test_answers_of_real_dialogue_never_stand_beside_their_own(assets, gpt2):
    path = str(assets / "preferences" / "hh_helpful_test.jsonl.gz")
    datamodule = UnpairedDataModule(path, tokenizer=gpt2, on_bad_row="drop", max_prompt_length=512)
    datamodule.setup("fit")
    rows = datamodule.datasets["train"].to_list()
    own = [tuple(row["completion_ids"][0]) for row in rows]
    answers = {}
    for row, answer in zip(rows, own, strict=True):
        answers.setdefault(tuple(row["prompt_ids"]), set()).add(answer)
    for row in rows:
        mismatched = tuple(row["completion_ids"][1])
        assert mismatched not in answers[tuple(row["prompt_ids"])]
        assert len(row["prompt_ids"]) + len(mismatched) <= 1024
