"""The report of an experiment, on runs whose curves are known."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from lightning_rlhf.cli.goodhart_report import Run, draw, markdown, outcome, read_run

STEPS = torch.arange(11, dtype=torch.float64)


def hump(seed, setting="plain", coef=0.0, fall=0.12, prompts=64):
    """Gold rises and falls, the proxy rises; KL is the step."""
    noise = 0.3 * torch.randn(11, prompts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gold = (STEPS - fall * STEPS**2)[:, None] + noise
    kl = STEPS[:, None].expand(11, prompts)
    return Run(setting, coef, seed, kl, 2 * kl, gold)


def test_the_peak_and_the_fall_of_a_known_curve():
    """s − 0.12 s² is largest, 2.08, at s = 4, and below 0 from s = 9 on."""
    found = outcome(hump(0))
    assert found.best_kl in (4, 4.5, 5)  # each half chooses, and s = 5 is worth 2
    assert found.best == pytest.approx(2.08, abs=0.25)
    assert found.lost_kl == 9
    assert found.end == pytest.approx(-2.0, abs=0.2)
    assert found.end_proxy == 20
    assert outcome(hump(0, fall=0.0)).lost_kl == math.inf


def test_the_best_of_noise_is_not_better_than_nothing():
    """Chosen on one half of the prompts and measured on the other, chance gains nothing on average."""
    found = []
    for seed in range(200):
        flat = torch.randn(11, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        kl = STEPS[:, None].expand(11, 16)
        found.append(outcome(Run("plain", 0.0, seed, kl, kl, flat)).best)
    mean = sum(found) / len(found)
    assert abs(mean) < 4 * torch.tensor(found).std().item() / 200**0.5


def test_the_alarm_and_what_a_choice_misses():
    """At s = 6 of s − 0.12 s² 1.68 is left; a choice by prompts that say another thing than the rest misses much."""
    run = hump(0)
    found = outcome(replace(run, alarm=6))
    assert found.alarm_kl == 6
    assert found.alarm == pytest.approx(1.68, abs=0.25)
    assert found.missed < 0.05
    assert math.isnan(outcome(run).alarm)
    apart = run.gold.clone()
    apart[7, 0::2] += (
        9  # 10.12 on these prompts, and 1.12 on the others, which would have chosen 2.08 at s = 4
    )
    found = outcome(replace(run, gold=apart))
    assert found.missed == pytest.approx(8.04 - 1.96 * 0.3 * 2**0.5 / 32**0.5, abs=0.25)
    assert found.best == pytest.approx((1.12 + 2.08) / 2, abs=0.25)
    assert found.best_kl in ((7 + 4) / 2, (7 + 5) / 2)


def test_table_and_picture(tmp_path):
    runs = [
        hump(seed, setting, coef, 0.12 if coef == 0 else 0.02)
        for setting in ("plain", "odd | one")
        for coef in (0.0, 0.1)
        for seed in range(3)
    ]
    table = markdown(runs)
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert "| 3 of 3 |" in lines[2]
    assert "| 0 of 3 |" in lines[3]
    later, more = (
        cells(lines)[0].index(name) for name in ("later than the first row", "more than the first row")
    )
    found = cells(lines[2:])
    assert found[2][0] == r"odd \| one"
    # What does not fall ends at 10, later than 9.
    assert [row[later] for row in found] == ["", "3 of 3", "0 of 3", "3 of 3"]
    assert found[0][more] == ""
    assert found[2][more] == "0.00 ± 0.00"
    assert float(found[1][more].split()[0]) == pytest.approx(10 - 2 - 2.08, abs=0.2)  # s − 0.02 s² at its end
    figure = draw(runs)
    figure.savefig(tmp_path / "both.png")
    left, right = figure.axes
    assert len(left.collections) == 2  # a band a setting
    assert [text.get_text() for text in right.get_xticklabels()] == ["0", "0.1"]


def test_later_is_said_of_seeds_that_fell_in_the_first_row():
    """Of two seeds one fell at 9: one that ends at 10 without falling is later, one that ends at 5 may be or not."""
    plain = [hump(0), hump(1, fall=0.0)]
    near = replace(hump(0, "near", fall=0.0), kl=torch.full((11, 64), 5.0).double())
    far = [hump(seed, "far", fall=0.0) for seed in (0, 1)]
    found = cells([line for line in markdown([*plain, near, *far]).splitlines() if line.startswith("|")])
    later = found[0].index("later than the first row")
    assert [row[later] for row in found[2:]] == ["", "0 of 1", "1 of 1"]
    found = cells(markdown([plain[1], far[1]]).splitlines()[:4])
    assert found[3][later] == ""


def test_the_error_of_the_best_is_its_spread():
    found = []
    for seed in range(300):
        noise = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gold = noise + torch.tensor([[0.0], [9.0], [1.0]])
        found.append(outcome(Run("plain", 0.0, seed, gold, gold, gold)))
    spread = torch.tensor([one.best for one in found]).std().item()
    assert sum(one.best_error for one in found) / len(found) == pytest.approx(spread, rel=0.15)


def cells(lines):
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_what_is_left_of_the_rollouts_is_left_out(tmp_path):
    sizes = {0: 9, 8: 6, 16: 6, 18: 2}
    rows = [
        {"step": step, "kl": [1.0] * n, "proxy": [1.0] * n, "gold": [1.0] * n} for step, n in sizes.items()
    ]
    (tmp_path / "evaluations.json").write_text(json.dumps(rows))
    (tmp_path / "goodhart.json").write_text(json.dumps({"alarms": [18]}))
    run = read_run("plain", 0.1, 7, tmp_path)
    assert [len(row) for row in run.gold] == [9, 6, 6]
    assert run.alarm is None


def test_runs_are_read_from_what_a_monitor_wrote(tmp_path):
    rows = [{"step": s, "rows": [0, 1], "kl": [0.0, s], "proxy": [s, s], "gold": [1.0, 2.0]} for s in (0, 5)]
    (tmp_path / "evaluations.json").write_text(json.dumps(rows))
    (tmp_path / "goodhart.json").write_text(json.dumps({"alarms": [5, 9]}))
    run = read_run("plain", 0.1, 7, tmp_path)
    assert run.alarm == 1
    assert [row.tolist() for row in run.kl] == [[0.0, 0.0], [0.0, 5.0]]
    assert run.proxy[1].tolist() == [5.0, 5.0]
    assert (run.setting, run.coef, run.seed) == ("plain", 0.1, 7)
