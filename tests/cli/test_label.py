"""label: ranked samples that a reward model trains on."""

import json

import pytest
import torch

from lightning_rlhf.cli.label import kept_rows, ranked_rows
from lightning_rlhf.data import PreferenceDataModule
from lightning_rlhf.rewards import Samples

JUDGE = "def letters(completions, wanted):\n    return [c.count(w) for c, w in zip(completions, wanted)]\n"


@pytest.fixture
def words(llama_dir, tmp_path):
    rows = [{"prompt": f"tell me {i}:", "wanted": "ab"[i % 2]} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judges.py").write_text(JUDGE)
    common = ("label", "--policy", llama_dir, "--prompts", "prompts.jsonl", "--output", "ranked.jsonl")
    return (*common, "--sampling.max_new_tokens", 12, "--n", 4)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_ranked_by_a_judge_after_the_rows_that_were_kept(program, words, tmp_path, llama_dir):
    earlier = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "d", "completions": ["e", "f"], "ranks": [2, 1]},
    ]
    (tmp_path / "earlier.jsonl").write_text("".join(json.dumps(row) + "\n" for row in earlier))
    judge = ("--judge", "FunctionReward", "--judge.function", "judges.py:letters")
    code, printed, error = program(*words, *judge, "--keep", "earlier.jsonl")
    assert code == 0, error[-2000:]
    rows = rows_of(tmp_path / "ranked.jsonl")
    count = len(rows) - 2
    assert f"wrote {count} prompts with at most 4 completions to ranked.jsonl, after 2 rows" in printed
    assert count >= 2
    assert count == 5 or f"{5 - count} prompts are left out" in printed
    assert rows[0] == {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}
    assert rows[1] == {"prompt": "d", "completions": ["e", "f"], "ranks": [2, 1]}
    for row in rows[2:]:
        wanted = "ab"[int(row["prompt"][-2]) % 2]
        scores = [text.count(wanted) for text in row["completions"]]
        assert len(set(row["completions"])) == len(row["completions"]) >= 2
        pairs = [(a, b) for a in range(len(scores)) for b in range(len(scores))]
        for a, b in pairs:
            assert (scores[a] > scores[b]) == (row["ranks"][a] < row["ranks"][b])
    data = PreferenceDataModule(str(tmp_path / "ranked.jsonl"), tokenizer=llama_dir, batch_size=20)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).num_groups == len(rows)


def test_people_fill_in_what_a_training_refuses_until_then(program, words, tmp_path, llama_dir):
    code, printed, error = program(*words)
    assert code == 0, error[-2000:]
    assert 'fill in "ranks"' in printed
    assert all(row["ranks"] is None for row in rows_of(tmp_path / "ranked.jsonl"))
    data = PreferenceDataModule(str(tmp_path / "ranked.jsonl"), tokenizer=llama_dir, batch_size=2)
    with pytest.raises(ValueError, match="ranks"):
        data.setup("fit")
    code, _, error = program(*words)
    assert code == 1
    assert "--overwrite" in error


def test_an_empty_sample_is_in_no_ranking():
    samples = Samples(["a"] * 4, ["x", "", "y", " "], [[5]] * 4, [[6]] * 4, [False] * 4)
    (row,) = ranked_rows(samples, torch.tensor([[1.0, 9.0, 2.0, 8.0]]), 4)
    assert (row["completions"], row["ranks"]) == (["x", "y"], [2, 1])
    assert list(ranked_rows(samples.select([1, 3]), torch.zeros(1, 2), 2)) == [None]


def test_rows_that_cannot_be_kept_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completions": ["b", "c"]}\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, row 2: columns prompt, completion;"):
        kept_rows(path)


def test_one_sample_cannot_be_ranked(program, words):
    code, _, error = program(*words[:-1], 1)
    assert code == 1
    assert "n must be at least 2" in error
