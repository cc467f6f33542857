"""The quickstart as a whole, with its real stages at a small size."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf.cli import pipeline
from lightning_rlhf.cli.plan import PLAN
from lightning_rlhf.cli.quickstart import carry_out
from lightning_rlhf.cli.stage import logged
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.models.reward_directory import load_scorer
from lightning_rlhf.sandbox import Annotator, World, best_accuracy
from tests.cli.quickstart_worker import fit_here, small_plan

ROOT = Path(__file__).parents[2]
NAMES = [stage.title for stage in PLAN.stages]
ALGORITHMS = {"RM": "RewardModel"}
POLICIES = [name for name in NAMES if name != "RM"]


def run(plan, folder, *, seed=0, overwrite=False):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.subprocess, "run", fit_here())
        carry_out(plan, folder, seed, overwrite=overwrite)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder that was never interrupted; no test changes it."""
    folder = tmp_path_factory.mktemp("finished") / "quickstart"
    run(small_plan(), folder)
    return folder


def table(folder):
    """The numbers of the table, without the seconds."""
    stages = json.loads((folder / "report" / "table.json").read_text())["stages"]
    return [{name: value for name, value in stage.items() if name != "seconds"} for stage in stages]


def test_the_report_has_a_row_for_every_stage(finished):
    assert {path.name for path in (finished / "report").iterdir()} == {
        "table.md",
        "table.json",
        "quickstart.png",
        "samples.jsonl",
    }
    rows = table(finished)
    assert [row["stage"] for row in rows] == NAMES
    assert (rows[0]["win_rate"], rows[0]["divergence"]["kl"]) == (0.5, 0.0)
    assert all(row["divergence"]["kl"] > 0 for row in rows[1:] if row["stage"] in POLICIES)
    text = (finished / "report" / "table.md").read_text()
    assert all(f"| {name} |" in text for name in NAMES)
    assert "12 samples a policy" in text
    assert (finished / "report" / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_the_samples_are_where_the_table_comes_from(finished):
    lines = (finished / "report" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["stage"] for sample in samples] == [name for name in POLICIES for _ in range(12)]
    for row in (row for row in table(finished) if row["stage"] in POLICIES):
        own = [sample for sample in samples if sample["stage"] == row["stage"]]
        assert sum(sample["gold"] for sample in own) / 12 == pytest.approx(row["gold"])
        assert sum(sample["malformed"] for sample in own) / 12 == pytest.approx(row["malformed"])
    held_out = {json.loads(line)["prompt"] for line in (finished / "sandbox/prompts_val.jsonl").open()}
    assert {sample["prompt"] for sample in samples} <= held_out


def test_the_reward_model_is_judged_on_held_out_pairs(finished):
    row = table(finished)[NAMES.index("RM")]
    ordering = row["ordering"]
    assert row["win_rate"] is None
    assert "gold" not in row
    assert (
        ordering["num_pairs"] == len((finished / "sandbox/reward_test.jsonl").read_text().splitlines()) == 40
    )
    assert ordering["lower"] < ordering["accuracy"] < ordering["upper"]
    world, annotator = World(0), Annotator(World(0))
    best = best_accuracy([annotator.probability(*pair) for pair in world.pairs(40, "val", seed=1)])
    assert ordering["best"] == best
    pairs = [json.loads(line) for line in (finished / "sandbox/reward_test.jsonl").open()]
    scorer, tokenizer = (
        load_scorer(str(finished / "rm/model")),
        AutoTokenizer.from_pretrained(finished / "rm/model"),
    )
    scores = [
        scorer(pack([PromptGroup(tokenizer(p["prompt"]).input_ids, [tokenizer(p[kind] + "</s>").input_ids])]))
        for p in pairs
        for kind in ("chosen", "rejected")
    ]
    right = sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True))
    assert ordering["accuracy"] == pytest.approx(right.item() / 40)


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_leaves_a_checkpoint_logs_and_a_model(finished, name):
    folder = finished / name.lower()
    saved = torch.load(folder / "checkpoints" / "end.ckpt", weights_only=True)
    assert (saved["algorithm"], saved["global_step"]) == (ALGORITHMS.get(name, name), 24)
    stage = PLAN.stages[NAMES.index(name)]
    curve = logged(folder / "run" / "lightning_logs", stage.metric)
    assert curve["steps"] == ([0, 1, 2] if name == "PPO" else [9, 19])
    stages = json.loads((finished / "report" / "table.json").read_text())["stages"]
    assert stages[NAMES.index(name)]["seconds"] > 0
    if name == "RM":
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
        assert load_scorer(str(folder / "model")).head.is_normalized
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
    start = AutoModelForCausalLM.from_pretrained(finished / "sandbox" / "model")
    assert not torch.equal(model.model.norm.weight, start.model.norm.weight)
    assert AutoTokenizer.from_pretrained(folder / "model").pad_token == "<pad>"


def killed_in(stage, folder):
    """A process that kills itself at the first step after 11 of a stage."""
    command = ["timeout", "-k", "5", "200", sys.executable, "-m", "tests.cli.quickstart_worker"]
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, folder, stage.lower()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_in_the_first_and_the_last_stage_and_continued_gives_the_same_table(
    finished, tmp_path, capsys
):
    folder = tmp_path / "quickstart"
    for name in (NAMES[0], NAMES[-1]):
        killed = killed_in(name, folder)
        assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr[-3000:]
        (kept,) = (folder / name.lower() / "checkpoints").iterdir()
        assert kept.name == ("epoch=0-step=16.ckpt" if name == "PPO" else "epoch=0-step=10.ckpt")
        assert not (folder / name.lower() / "model").exists()
        assert not (folder / "report").exists()
    run(small_plan(), folder)
    printed = capsys.readouterr().out
    assert all(f"{name.lower()}: done already" in printed for name in NAMES[:-1])
    assert f"continuing from {folder / NAMES[-1].lower() / 'checkpoints'}" in printed
    assert table(folder) == table(finished)
    for stage in PLAN.stages:
        curves = (logged(f / stage.name / "run" / "lightning_logs", stage.metric) for f in (folder, finished))
        assert next(curves) == next(curves)
    for file in ("report/samples.jsonl", *(f"{name.lower()}/model/model.safetensors" for name in NAMES)):
        assert (folder / file).read_bytes() == (finished / file).read_bytes()


def test_a_finished_quickstart_is_kept_without_overwrite(program, finished):
    before = (finished / "report" / "table.md").stat()
    code, _, error = program("quickstart", "--output", finished)
    assert code == 1
    assert f"{finished} holds a finished quickstart" in error
    assert "--overwrite to do it again" in error
    assert (finished / "report" / "table.md").stat() == before


def test_overwrite_starts_anew(finished, tmp_path):
    folder = tmp_path / "quickstart"
    shutil.copytree(finished, folder)
    (folder / "old").write_text("of the run before")
    plan = small_plan()
    run(replace(plan, stages=plan.stages[:1]), folder, seed=1, overwrite=True)
    assert not (folder / "old").exists()
    assert json.loads((folder / "quickstart.json").read_text()) == {"seed": 1}
    assert json.loads((folder / "sandbox" / "sandbox.json").read_text())["seed"] == 1
    assert [row["stage"] for row in table(folder)] == NAMES[:1]
    assert not (folder / NAMES[1].lower()).exists()
    assert table(folder)[0] != table(finished)[0]


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_folder_of_something_else_is_refused(program, tmp_path, flags):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    code, _, error = program("quickstart", "--output", "thesis", *flags)
    assert code == 1
    assert "thesis holds something else than a quickstart: give another --output" in error
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_file_is_refused(program, tmp_path):
    (tmp_path / "thesis").write_text("mine")
    code, _, error = program("quickstart", "--output", "thesis", "--overwrite")
    assert code == 1
    assert "holds something else than a quickstart" in error
    assert (tmp_path / "thesis").read_text() == "mine"


def test_another_seed_does_not_go_on_with_an_unfinished_folder(program, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "quickstart.json").write_text('{"seed": 3}')
    code, _, error = program("quickstart", "--output", "begun", "--seed", "4")
    assert code == 1
    assert "begun was begun with --seed 3: give it again, or --overwrite to start anew" in error
