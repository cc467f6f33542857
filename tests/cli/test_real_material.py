"""A recipe and an override on a real pretrained model and real data: what must get better does."""

import csv
import gzip
from itertools import islice
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ON_CPU = (
    *("--data.num_workers", "0"),
    *("--trainer.accelerator", "cpu"),
    *("--trainer.precision", "32-true"),
    *("--trainer.accumulate_grad_batches", "1"),
    *("--trainer.val_check_interval", "1.0"),
    *("--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
)
WHOLE = pytest.param(None, marks=pytest.mark.slow, id="whole")


def command(name, recipe, assets, *overrides):
    model = ("--model.policy.path", assets / "stories260K-hf")
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", name)
    return [name, "--config", REPOSITORY / "recipes" / f"{recipe}.yaml", *model, *ON_CPU, *logger, *overrides]


def logged(folder, metric):
    """Every logged value of a metric, in order."""
    (path,) = Path(folder).glob("lightning_logs/version_0/metrics.csv")
    with path.open() as file:
        return [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]


@pytest.mark.parametrize("num_batches", [pytest.param(12, id="part"), WHOLE])
def test_sft_lowers_the_perplexity_of_held_out_stories(program, assets, tmp_path, num_batches):
    part = [] if num_batches is None else ["--trainer.limit_train_batches", num_batches]
    overrides = (
        *("--data.train", assets / "text/tinystories_train.jsonl.gz"),
        *("--data.val", assets / "text/tinystories_test.jsonl.gz"),
        *("--data.max_length", "512"),
        *("--model.optimization.lr", "3e-4"),
        *part,
    )
    for name in ("validate", "fit"):
        code, _, error = program(*command(name, "sft", assets, *overrides))
        assert code == 0, error[-2000:]
    (before,), (after,) = (logged(tmp_path / name, "val/perplexity") for name in ("validate", "fit"))
    assert before == pytest.approx(4.3, abs=0.3)  # what the material's description says
    assert after < (0.95 if num_batches is None else 0.98) * before
    assert len(logged(tmp_path / "fit", "train/loss")) == (num_batches or 88)


@pytest.mark.parametrize("num_pairs", [pytest.param(96, id="part"), WHOLE])
def test_dpo_learns_the_pairs_of_one_epoch(program, assets, tmp_path, num_pairs):
    """Accuracy on the very pairs that were trained on: on unseen ones these data are close to noise."""
    pairs = assets / "preferences/hh_helpful_train.jsonl.gz"
    if num_pairs is not None:
        with gzip.open(pairs, "rt") as file:
            (tmp_path / "pairs.jsonl").write_text("".join(islice(file, num_pairs)))
        pairs = tmp_path / "pairs.jsonl"
    overrides = (
        *("--data.train", pairs),
        *("--data.val", pairs),
        *("--data.on_bad_row", "drop"),
        *("--data.max_length", "128"),
        *("--data.max_prompt_length", "64"),
        *("--data.batch_size", "16" if num_pairs is None else "8"),
        *("--model.optimization.lr", "1e-4" if num_pairs is None else "1e-3"),
    )
    code, _, error = program(*command("fit", "dpo", assets, *overrides))
    assert code == 0, error[-2000:]
    during = logged(tmp_path / "fit", "train/rewards/accuracies")
    assert len(during) == (12 if num_pairs else 187)
    assert during[0] == 0.5  # policy and reference agree: every pair is a tie
    (after,) = logged(tmp_path / "fit", "val/rewards/accuracies")
    assert after > 0.65
