import json

import pytest
import torch

from lightning_rlhf.cli.measure import Divergence, divergence, standard_error, win_rate
from lightning_rlhf.cli.ordering import Ordering
from lightning_rlhf.cli.report import Row, console_table, write_report
from lightning_rlhf.generation import Sampling, generate
from lightning_rlhf.models import LanguageModel
from tests.models.families import tiny
from tests.tokenizers import letters


def samples(model, count):
    sampling = Sampling(max_new_tokens=6, batch_size=count)
    return [several[0] for several in generate(model, letters(), [[5, 6, 7]] * count, sampling)]


def test_divergence_from_itself_is_zero():
    model = LanguageModel(tiny("LlamaConfig"), layout="padded").eval()
    found = divergence(model, model, samples(model, 5))
    assert (found.kl, found.error, found.k1, found.k3) == (0, 0, 0, 0)


def test_divergence_equals_a_sum_over_the_vocabulary_one_token_at_a_time():
    policy, other = (LanguageModel(tiny("LlamaConfig", seed=seed), layout="padded").eval() for seed in (0, 1))
    drawn = samples(policy, 3)
    totals = []
    with torch.no_grad():
        for one in drawn:
            total = 0.0
            for end in range(len(one.tokens)):
                ids = torch.tensor([one.prompt + one.tokens[:end]])
                p, q = (m.model(input_ids=ids).logits[0, -1].softmax(-1) for m in (policy, other))
                total += float((p * (p / q).log()).sum())
            totals.append(total)
    found = divergence(policy, other, drawn)
    assert found.kl == pytest.approx(sum(totals) / 3, rel=1e-4)
    assert found.kl > 0
    assert found.error == pytest.approx(standard_error(totals), rel=1e-3)


def test_estimates_agree_with_the_exact_sum():
    policy, other = (LanguageModel(tiny("LlamaConfig", seed=seed), layout="padded").eval() for seed in (0, 1))
    found = divergence(policy, other, samples(policy, 400))
    assert found.k1 == pytest.approx(found.kl, rel=0.2)
    assert found.k3 == pytest.approx(found.kl, rel=0.3)


def test_win_rate_is_a_half_against_itself():
    assert win_rate([0.5, 1.0, 2.0], [0.5, 1.0, 2.0]) == 0.5
    assert win_rate([1.0, 1.0], [0.0, 0.0]) == 1.0


def row(stage, gold, curve=None):
    return Row(
        stage=stage,
        seconds=61.2,
        gold=gold,
        divergence=Divergence(1.25, 0.1, 1.3, 1.2),
        win_rate=0.75,
        mean_length=20.5,
        malformed=0.05,
        truncated=0.0,
        curve=curve,
    )


def reward_model_row():
    ordering = Ordering(
        num_pairs=3000,
        accuracy=0.7,
        lower=0.68,
        upper=0.72,
        best=0.84,
        longer_wins=0.6,
        calibration_error=0.0123,
        length_correlation=0.4,
    )
    curve = {"name": "train/accuracy", "unit": "optimizer step", "steps": [10, 20], "values": [0.5, 0.6]}
    return Row(stage="RM", seconds=30.0, ordering=ordering, curve=curve)


def test_report_holds_the_table_the_picture_and_the_samples(tmp_path):
    curve = {"name": "train/loss", "unit": "optimizer step", "steps": [10, 20], "values": [2.0, 1.0]}
    rows = [row("SFT", [1.0, 3.0], curve), reward_model_row(), row("DPO", [2.0, 4.0])]
    write_report(tmp_path, rows, [{"stage": "SFT", "prompt": "a", "completion": "b"}], seconds=99.6)
    text = (tmp_path / "table.md").read_text()
    assert (
        "| SFT | 2.00 ± 1.00 | 1.25 ± 0.10 | 1.30, 1.20 | 75% | 20.5 | 5.0% | 0.0% |  |  |  |  | 61 |" in text
    )
    judged = "70.0% (68.0% to 72.0%) | 84.0% | 0.012 | +0.40 | 30 |"
    assert f"| RM |  |  |  |  |  |  |  | {judged}" in text
    assert "2 samples a policy" in text
    assert "3,000 held-out ones" in text
    assert "preferring the longer answer is right on 60.0%" in text
    assert "100 seconds" in text
    sft, rm, dpo = json.loads((tmp_path / "table.json").read_text())["stages"]
    assert (sft["stage"], sft["gold"], sft["gold_error"], sft["divergence"]["kl"]) == ("SFT", 2.0, 1.0, 1.25)
    assert (rm["stage"], rm["ordering"]["best"], rm["win_rate"], "gold" in rm) == ("RM", 0.84, None, False)
    assert (dpo["gold"], dpo["num_samples"]) == (3.0, 2)
    assert (tmp_path / "quickstart.png").read_bytes()[1:4] == b"PNG"
    assert json.loads((tmp_path / "samples.jsonl").read_text())["completion"] == "b"
    assert console_table(rows).row_count == 3
    assert str(rows[1].ordering).startswith("right on 70.0% (68.0% to 72.0%) of 3,000 held-out pairs")


def test_a_report_without_a_reward_model_says_nothing_of_pairs(tmp_path):
    write_report(tmp_path, [row("SFT", [1.0, 3.0])], [], seconds=1.0)
    assert "Pairs:" not in (tmp_path / "table.md").read_text()
