import json
import math

import pytest
import torch

from lightning_rlhf import functional as RF
from lightning_rlhf.algorithms import RewardModel
from lightning_rlhf.cli.best_of_n import standardised
from lightning_rlhf.data import SFTDataModule
from tests.cli.test_recipes import save_reward

REWARD = "def letters(completions, wanted):\n    return [c.count(w) for c, w in zip(completions, wanted)]\n"


@pytest.fixture
def words(llama_dir, tmp_path):
    rows = [{"prompt": f"tell me {i}:", "wanted": "ab"[i % 2]} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    common = ("best-of-n", "--policy", llama_dir, "--prompts", "prompts.jsonl", "--output", "best.jsonl")
    return (*common, "--sampling.max_new_tokens", 12, "--sampling.batch_size", 2)


def test_the_best_of_n_by_a_function(program, words, tmp_path, llama_dir):
    function = ("--proxy", "FunctionReward", "--proxy.function", "my_rewards.py:letters")
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
    code, printed, error = program(*words, "--proxy", "reward-model", "--n", 2)
    assert code == 0, error[-2000:]
    assert "the best of 2 completions for 5 prompts" in printed


GOLD = "def variety(completions):\n    return [len(set(c)) - 0.1 * len(c) for c in completions]\n"


def test_a_gold_reward_shows_what_the_proxy_is_worth(program, words, tmp_path):
    (tmp_path / "golden.py").write_text(GOLD)
    rewards = ("--proxy", "FunctionReward", "--proxy.function", "my_rewards.py:letters")
    rewards += ("--gold", "FunctionReward", "--gold.function", "golden.py:variety")
    code, printed, error = program(*words[:5], *words[7:], *rewards, "--report", "report", "--n", 8)
    assert code == 0, error[-2000:]
    assert "mean gold" in printed
    assert not (tmp_path / "best.jsonl").exists()
    table = json.loads((tmp_path / "report" / "table.json").read_text())
    assert table["n"] == [1, 2, 4, 8]
    assert table["proxy"] == sorted(table["proxy"])
    assert len(table["gold"]) == len(table["gold_error"]) == 4
    assert (tmp_path / "report" / "best_of_n.png").read_bytes().startswith(b"\x89PNG")
    code, _, error = program(*words[:5], *words[7:], *rewards, "--report", "report", "--n", 8)
    assert code == 1
    assert "--overwrite" in error


def test_standardised_by_single_samples():
    proxy = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    scores = torch.stack([proxy, -proxy])
    curve = standardised(RF.best_of_n_curve(*scores), scores)
    std = 16 / 3  # the variance of 0, 4, 0, 4
    assert curve.proxy.tolist() == pytest.approx([0.0, 2 / std**0.5])
    assert curve.gold.tolist() == pytest.approx([0.0, -2 / std**0.5])
    with pytest.raises(ValueError, match="gold is the same for all samples"):
        standardised(RF.best_of_n_curve(proxy, 0 * proxy), torch.stack([proxy, 0 * proxy]))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--proxy", "x", "--n", 0), "n must be at least 1"),
        (("--proxy", "x", "--n", 4, "--sampling.num_samples", 2), "stands for sampling.num_samples"),
    ],
)
def test_what_does_not_fit_is_one_message(program, words, extra, message):
    code, _, error = program(*words, *extra)
    assert code == 1
    assert message in error
