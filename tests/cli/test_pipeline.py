"""A pipeline is what the commands fit and export would be given, stage after stage."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from lightning_rlhf.cli import pipeline as pipeline_module
from lightning_rlhf.cli.main import main
from lightning_rlhf.cli.pipeline import LabellingStage
from tests.cli.test_recipes import RECIPES, sandbox  # noqa: F401 - a fixture

ROOT = RECIPES.parent


@pytest.fixture
def tiny(sandbox, tmp_path):  # noqa: F811
    """The tiny pipeline, cut down to two steps and to one rollout."""
    (tmp_path / "sandbox").symlink_to(sandbox)
    (tmp_path / "recipes").symlink_to(RECIPES)
    settings = yaml.safe_load((RECIPES / "pipelines/tiny.yaml").read_text())
    for stage in settings["stages"].values():
        stage["overrides"]["trainer"] = {"max_steps": 2}
    settings["stages"]["ppo"]["overrides"]["trainer"]["max_steps"] = 4
    settings["stages"]["ppo"]["overrides"]["model"]["init_args"]["sampling"]["max_new_tokens"] = 4

    def write(**changes):
        settings["stages"]["sft"].update(changes)
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))

    write()
    return write


@pytest.fixture
def here(monkeypatch):
    """Run ``fit`` in this process, since starting one takes most of the time; the commands that were run."""
    seen = []

    def run(command, check):
        assert command[:3] == [sys.executable, "-m", "lightning_rlhf.cli.child"]
        seen.append(command[3:])
        try:
            main(command[3:])
        except SystemExit as stop:
            return subprocess.CompletedProcess(command, int(stop.code or 0))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(pipeline_module.subprocess, "run", run)
    return seen


def given(command, flag):
    return [value for name, value in zip(command, command[1:], strict=False) if name == flag]


def test_stages_run_on_what_the_former_made_and_finished_ones_are_skipped(program, tiny, here, tmp_path):
    code, printed, error = program("pipeline", "--config", "tiny.yaml")
    assert code == 0, error[-3000:]
    assert [Path(given(command, "--config")[0]).stem for command in here] == ["sft", "reward_model", "ppo"]
    for name in ("sft", "reward_model", "ppo"):
        assert (tmp_path / "pipeline" / name / "model" / "model.safetensors").is_file()
    used = yaml.safe_load(next(tmp_path.glob("pipeline/ppo/run/**/config.yaml")).read_text())["model"]
    assert used["init_args"]["policy"]["path"] == "pipeline/sft/model"
    assert used["init_args"]["reward"]["init_args"]["model"] == "pipeline/reward_model/model"
    saved = torch.load(tmp_path / "pipeline/ppo/checkpoints/end.ckpt", weights_only=True)
    assert (saved["algorithm"], saved["global_step"]) == ("PPO", 4)
    assert program("report", "pipeline")[0] == 0
    page = (tmp_path / "pipeline/report.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in ("sft: SFT", "reward_model: RewardModel", "ppo: PPO"))
    assert f"torch {torch.__version__}".replace(" ", "\xa0") in page  # as fit recorded it
    assert page.index('id="run-2"') > page.index("<h2>reward_model: RewardModel</h2>")

    code, printed, _ = program("pipeline", "--config", "tiny.yaml")
    assert code == 0
    assert printed.count("done already") == 3
    assert len(here) == 3

    tiny(merge=False)  # another configuration
    code, _, error = program("pipeline", "--config", "tiny.yaml")
    assert code == 1
    assert "stage sft was begun with another configuration" in error
    assert "--overwrite to run it and all later stages anew" in error
    assert (tmp_path / "pipeline/ppo/model").is_dir()
    code, printed, error = program("pipeline", "--config", "tiny.yaml", "--overwrite")
    assert code == 0, error[-3000:]
    assert len(here) == 6


@pytest.fixture
def relabel(sandbox, tmp_path):  # noqa: F811
    """Rounds of re-labelling, cut down to two steps and to one rollout a round, with few prompts."""
    (tmp_path / "sandbox").symlink_to(sandbox)
    (tmp_path / "recipes").symlink_to(RECIPES)
    rows = [json.loads(line) for line in (sandbox / "preferences_train.jsonl").read_text().splitlines()]
    lines = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(lines[:6]))
    settings = yaml.safe_load((RECIPES / "pipelines/relabel.yaml").read_text())
    for name, stage in settings["stages"].items():
        if "overrides" in stage:
            stage["overrides"]["trainer.max_steps"] = 4 if name.startswith("ppo") else 2
            stage["overrides"].pop("trainer.val_check_interval", None)
            stage["overrides"].pop("data.init_args.val", None)
    for name in ("ppo_1", "ppo_2"):
        settings["stages"][name]["overrides"]["model.init_args.sampling.max_new_tokens"] = 4
    (tmp_path / "judge.py").write_text(
        "def size(completions):\n    return [len(text) for text in completions]\n"
    )
    judge = {"class_path": "FunctionReward", "init_args": {"function": "judge.py:size"}}
    settings["stages"]["labels_2"]["label"] |= {"prompts": "prompts.jsonl", "judge": judge}
    settings["stages"]["labels_2"]["label"]["sampling"]["max_new_tokens"] = 6
    return settings


def test_a_round_of_relabelling(program, relabel, here, tmp_path):
    (tmp_path / "relabel.yaml").write_text(yaml.safe_dump(relabel, sort_keys=False))
    code, printed, error = program("pipeline", "--config", "relabel.yaml")
    assert code == 0, error[-3000:]
    rows = [
        json.loads(line) for line in (tmp_path / "relabel/labels_2/ranked.jsonl").read_text().splitlines()
    ]
    kept = len((tmp_path / "sandbox/preferences_train.jsonl").read_text().splitlines())
    assert kept < len(rows) <= kept + 6
    assert {len(row["completions"]) for row in rows[:kept]} == {2}
    assert max(len(row["completions"]) for row in rows[kept:]) > 2
    used = yaml.safe_load(next(tmp_path.glob("relabel/ppo_2/run/**/config.yaml")).read_text())["model"]
    assert used["init_args"]["policy"]["path"] == "relabel/ppo_1/model"
    assert used["init_args"]["reference"] == "relabel/sft/model"
    assert used["init_args"]["reward"]["init_args"]["model"] == "relabel/reward_model_2/model"
    code, printed, _ = program("pipeline", "--config", "relabel.yaml")
    assert code == 0
    assert printed.count("done already") == 6


def test_a_pipeline_waits_for_people_and_goes_on(program, relabel, here, tmp_path):
    del relabel["stages"]["labels_2"]["label"]["judge"]
    del relabel["stages"]["labels_2"]["label"]["keep"]
    labels = {
        "policy": "${sft}",
        **{k: v for k, v in relabel["stages"]["labels_2"]["label"].items() if k != "policy"},
    }
    relabel["stages"] = {
        "sft": relabel["stages"]["sft"],
        "labels_2": {"label": labels},
        "reward_model_2": relabel["stages"]["reward_model_2"],
    }
    (tmp_path / "relabel.yaml").write_text(yaml.safe_dump(relabel, sort_keys=False))
    file = tmp_path / "relabel/labels_2/ranked.jsonl"
    for _ in range(2):
        code, printed, error = program("pipeline", "--config", "relabel.yaml")
        assert code == 0, error[-3000:]
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert f"{len(rows)} rows of relabel/labels_2/ranked.jsonl wait for people" in printed
        assert not (tmp_path / "relabel/reward_model_2").exists()
    for row in rows:
        row["ranks"] = list(range(len(row["completions"])))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, error = program("pipeline", "--config", "relabel.yaml")
    assert code == 0, error[-3000:]
    assert (tmp_path / "relabel/reward_model_2/model").is_dir()


def test_a_labelling_stage_writes_where_the_pipeline_says():
    with pytest.raises(ValueError, match="label names an output"):
        LabellingStage({"policy": "x", "output": "y"})


def test_a_finished_training_is_exported_without_training_again(program, tiny, here, tmp_path):
    settings = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    settings["stages"] = {"sft": settings["stages"]["sft"]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    assert program("pipeline", "--config", "tiny.yaml")[0] == 0
    (tmp_path / "pipeline/sft/model").rename(tmp_path / "before")
    assert program("pipeline", "--config", "tiny.yaml")[0] == 0
    weights = [
        folder / "model.safetensors" for folder in (tmp_path / "before", tmp_path / "pipeline/sft/model")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert len(here) == 1


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_bit_for_bit(program, tiny, tmp_path):
    """In real processes: the pipeline alone is killed after some checkpoint, and its training ends with it."""
    settings = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    sft = settings["stages"]["sft"]
    sft["overrides"] |= {
        "trainer": {"max_steps": 240, "max_epochs": -1},
        "data.init_args.batch_size": 2,
        "data.init_args.train": "sandbox/sft_train.jsonl",
    }
    del sft["overrides"]["data"]
    settings["stages"] = {"sft": sft}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "lightning_rlhf", "pipeline", "--config", "long.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    checkpoints = tmp_path / "pipeline/sft/checkpoints"
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        end = time.monotonic() + 120
        while not list(checkpoints.glob("epoch=*.ckpt")) and first.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        first.kill()
        first.wait()
    assert list(checkpoints.glob("epoch=*.ckpt")), (tmp_path / "log").read_text()[-3000:]
    assert not (checkpoints / "end.ckpt").exists(), "it had finished before it could be killed"
    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert "sft: continuing from" in again.stdout
    whole = [*command, "--output", "whole"]
    subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, check=True)
    ours, theirs = (
        torch.load(tmp_path / name / "sft/checkpoints/end.ckpt", weights_only=True)["state_dict"]
        for name in ("pipeline", "whole")
    )
    names = [name for name in theirs if name.startswith("policy.")]
    assert names
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


def test_a_stage_that_fails_is_named(program, tiny, here):
    tiny(overrides={"data": {"init_args": {"train": "nowhere.jsonl"}}})
    code, _, error = program("pipeline", "--config", "tiny.yaml")
    assert code == 1
    assert "nowhere.jsonl" in error
    assert "stage sft ended with exit code 1" in error
    assert len(here) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"overrides": {"model": {"path": "${ppo}"}}},
            "stage sft: ${ppo} is no earlier stage; known are output",
        ),
        ({"config": ["recipes/sftt.yaml"]}, "stage sft: no configuration at recipes/sftt.yaml"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(program, tiny, here, tmp_path, changes, message):
    tiny(**changes)
    code, _, error = program("pipeline", "--config", "tiny.yaml")
    assert code == 1
    assert message in error
    assert not (tmp_path / "pipeline").exists()
    assert not here


@pytest.mark.parametrize(
    ("key", "value", "expected"), [("checkpoint_step", 3, 2), ("checkpoint_steps", 0, 1), ("config", [], 1)]
)
def test_a_wrong_key_or_value_of_a_stage_is_named(program, tiny, here, key, value, expected):
    tiny(**{key: value})
    code, _, error = program("pipeline", "--config", "tiny.yaml")
    assert code == expected
    assert key in error
    assert not here


@pytest.mark.parametrize("name", ["output", "a-b"])
def test_a_name_that_is_no_placeholder_is_refused(program, tiny, here, tmp_path, name):
    settings = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    settings["stages"] = {name: settings["stages"]["sft"]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    code, _, error = program("pipeline", "--config", "tiny.yaml")
    assert code == 1
    assert f"letters, digits and _, not {name!r} ('output' is taken)" in error


def test_a_folder_of_something_else_is_left_alone(program, tiny, here, tmp_path):
    (tmp_path / "pipeline/sft").mkdir(parents=True)
    (tmp_path / "pipeline/sft/mine").write_text("")
    code, _, error = program("pipeline", "--config", "tiny.yaml", "--overwrite")
    assert code == 1
    assert "holds something else than a stage" in error
    assert (tmp_path / "pipeline/sft/mine").is_file()


def test_the_recipe_is_one(tmp_path):
    """Every stage of it names recipes that are there, and placeholders that are filled."""
    settings = yaml.safe_load((RECIPES / "pipelines/instructgpt.yaml").read_text())
    stages = {
        name: pipeline_module.TrainingStage(
            **{**stage, "config": [str(RECIPES.parent / path) for path in stage["config"]]}
        )
        for name, stage in settings["stages"].items()
    }
    plans = {name: pipeline_module.plan_of(name, stages, tmp_path) for name in stages}
    arguments = plans["ppo"]["overrides"]["model"]["init_args"]
    assert arguments["policy"]["path"] == str(tmp_path / "sft/model")
    assert arguments["reward"]["init_args"]["model"] == str(tmp_path / "reward_model/model")
