import json
import math

import pytest
import torch

from lightning_rlhf.algorithms import RewardModel
from lightning_rlhf.cli.best_of_n import worth
from lightning_rlhf.data import SFTDataModule
from tests.cli.test_recipes import save_reward

REWARD = "def letters(completions, wanted):\n    return [c.count(w) for c, w in zip(completions, wanted)]\n"


@pytest.fixture
def words(llama_dir, tmp_path):
    rows = [{"prompt": f"tell me {i}:", "wanted": "ab"[i % 2]} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    common = ("best-of-n", "--model", llama_dir, "--prompts", "prompts.jsonl", "--output", "best.jsonl")
    return (*common, "--sampling.max_new_tokens", 12, "--sampling.batch_size", 2)


def test_the_best_of_n_by_a_function(program, words, tmp_path, llama_dir):
    function = ("--reward", "FunctionReward", "--reward.function", "my_rewards.py:letters")
    code, printed, error = program(*words, *function, "--n", 6)
    assert code == 0, error[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"tell me {i}:" for i in range(5)]
    for i, row in enumerate(rows):
        assert row["score"] == row["completion"].count("ab"[i % 2])
    mean = sum(row["score"] for row in rows) / 5
    assert mean > 0
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    table = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert [cells[0] for cells in table] == ["1", "2", "4", "6"]
    assert float(table[-1][1]) == pytest.approx(mean, abs=1e-4)
    means = [float(cells[1]) for cells in table]
    assert means == sorted(means)
    assert means[0] < means[-1]
    assert float(table[0][3]) == 0.0
    assert float(table[1][3]) == pytest.approx(math.log(2) - 0.5, abs=1e-3)
    # The same again, and as data for SFT.
    code, _, error = program(*words, *function, "--n", 6)
    assert code == 1
    assert "best.jsonl" in error
    assert "--overwrite" in error
    before = (tmp_path / "best.jsonl").read_text()
    assert program(*words, *function, "--n", 6, "--overwrite")[0] == 0
    assert (tmp_path / "best.jsonl").read_text() == before
    data = SFTDataModule(str(tmp_path / "best.jsonl"), tokenizer=llama_dir, batch_size=5, on_bad_row="drop")
    data.setup("fit")
    assert next(iter(data.train_dataloader())).num_completions >= 1


def test_the_best_of_n_by_a_reward_model(program, words, tmp_path, llama_dir):
    save_reward(RewardModel(llama_dir), tmp_path / "reward-model")
    code, printed, error = program(*words, "--reward_model", "reward-model", "--n", 2)
    assert code == 0, error[-2000:]
    assert "the best of 2 completions for 5 prompts" in printed


def test_worth_by_hand():
    """Of 1, 2, 3: the best of two is 2 once and 3 twice in three pairs."""
    found = worth(torch.tensor([[3.0, 1.0, 2.0]]))
    assert [n for n, *_ in found] == [1, 2, 3]
    assert [mean for _, mean, *_ in found] == pytest.approx([2.0, 8 / 3, 3.0])
    assert math.isnan(found[0][2])
    assert [kl for *_, kl in found] == pytest.approx([0.0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    assert [n for n, *_ in worth(torch.zeros(1, 1))] == [1]
    assert [n for n, *_ in worth(torch.zeros(1, 8))] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "give either --reward_model DIRECTORY or --reward CLASS"),
        (("--reward_model", "x", "--n", 0), "n must be at least 1"),
        (("--reward_model", "x", "--n", 4, "--sampling.num_samples", 2), "stands for sampling.num_samples"),
    ],
)
def test_what_does_not_fit_is_one_message(program, words, extra, message):
    code, _, error = program(*words, *extra)
    assert code == 1
    assert message in error
