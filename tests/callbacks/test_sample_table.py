import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import PPO, RLOO, SFT, Optimization, Update
from lightning_rlhf.callbacks import SampleTable
from lightning_rlhf.callbacks.sample_table import COLUMNS, NAME, gathered, show
from lightning_rlhf.data import PromptCollator
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.generation import Sampling
from lightning_rlhf.rewards import Reward


class ShareOfA(Reward):
    def forward(self, samples):
        return torch.tensor([c.count("a") / len(c) if c else 0.0 for c in samples.completions])


def prompts(count=6, size=3):
    rows = [
        {"prompt_ids": [5 + i, 6, 7], "text": f"p{i}", "messages": None, "columns": {}, "row_id": i}
        for i in range(count)
    ]
    return DataLoader(rows, batch_size=size, collate_fn=PromptCollator())


def small_ppo(llama_dir):
    return PPO(
        llama_dir,
        ShareOfA(),
        sampling=Sampling(max_new_tokens=5, num_samples=2),
        estimator=RLOO(),
        optimization=Optimization(lr=1e-2, schedule="constant"),
        update=Update(num_epochs=1, minibatch_size=6),
    )


def test_every_validation_has_its_file(llama_dir, trainer, tmp_path):
    module = small_ppo(llama_dir)
    logger = CSVLogger(tmp_path, name="logs")
    run = trainer(callbacks=[SampleTable()], logger=logger, max_epochs=2)
    run.fit(module, prompts(), prompts(4, 2))
    folder = tmp_path / "logs/version_0/samples"
    # Two steps an epoch; what Lightning samples before training, to see that it can, is left out.
    assert sorted(path.name for path in folder.iterdir()) == ["step-2.jsonl", "step-4.jsonl"]
    rows = [json.loads(line) for line in (folder / "step-4.jsonl").read_text().splitlines()]
    assert rows == module.last_validation
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["prompt"] == "p2"
    assert set(rows[0]) == {"row", *COLUMNS}
    for row in rows:
        assert row["score"] == pytest.approx(row["completion"].count("a") / max(len(row["completion"]), 1))
        assert row["kl"] >= 0.0
    assert max(row["kl"] for row in rows) > 0.0  # the policy was trained
    mean = sum(row["score"] for row in rows) / len(rows)
    assert float(run.callback_metrics["val/objective/scores"]) == pytest.approx(mean, abs=1e-6)


def test_loggers_that_show_text_get_a_table():
    seen = {}

    class Board(TensorBoardLogger):
        experiment = SimpleNamespace(add_text=lambda *arguments: seen.update(board=arguments))

        def __init__(self):
            pass

    class Wandb(WandbLogger):
        def __init__(self):
            pass

        def log_table(self, key, columns, data, step):
            seen["wandb"] = (key, columns, data, step)

    chat = [{"role": "user", "content": "Hi\nthere"}]
    row = dict(zip(COLUMNS, (chat, "a|b", 0.5, 1.25, "c", 2.0), strict=True))
    for logger in (Board(), Wandb(), CSVLogger("nowhere")):
        show(logger, [row], 7)
    name, text, step = seen["board"]
    assert (name, step) == (NAME, 7)
    assert text.splitlines()[2] == "| user: Hi<br>there | a\\|b | 0.500 | 1.250 | c | 2.000 |"
    assert len(text.splitlines()) == 3
    assert seen["wandb"] == (NAME, list(COLUMNS), [["user: Hi\nthere", "a|b", 0.5, 1.25, "c", 2.0]], 7)


def test_rows_of_ranks_are_in_the_data_s_order_and_once():
    assert gathered([{"row": 3}, {"row": 1}, {"row": 3}], 1) == [{"row": 1}, {"row": 3}]


def test_what_does_not_sample_is_refused(llama_dir, trainer):
    loader = DataLoader([PromptGroup([5], [[6, 7]])], batch_size=1, collate_fn=pack)
    with pytest.raises(ValueError, match="SFT samples nothing: leave it out, or see HeldOutKL"):
        trainer(callbacks=[SampleTable()]).fit(SFT(llama_dir), loader, loader)
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        SampleTable(0)
