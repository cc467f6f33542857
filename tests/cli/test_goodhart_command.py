"""The experiment of recipes/experiments/goodhart.yaml, cut down to a few steps, in this process."""

import json
import time
from inspect import signature

import pytest
import yaml

from lightning_rlhf.cli import goodhart as command
from lightning_rlhf.cli.goodhart import Setting, known, run_stage, seeded_stage, stage_name
from lightning_rlhf.cli.goodhart_report import Run
from lightning_rlhf.cli.label import label
from lightning_rlhf.cli.pipeline import LabellingStage, TrainingStage, filled
from tests.cli.test_pipeline import here  # noqa: F401 - a fixture
from tests.cli.test_recipes import RECIPES

ROOT = RECIPES.parent


@pytest.fixture
def experiment(tmp_path):
    """Three settings of four, one seed, two rollouts each."""
    (tmp_path / "lightning_rlhf").symlink_to(ROOT / "lightning_rlhf")
    settings = yaml.safe_load((RECIPES / "experiments/goodhart.yaml").read_text())
    settings |= {"seeds": [3], "coefs": [0.0], "jobs": 1}
    settings["sizes"] = {"num_demonstrations": 64, "num_pairs": 32, "num_rankings": 8, "num_layers": 1}
    stages = settings["stages"]
    for name in ("sft", "reward", "ensemble", "refreshed"):
        stages[name]["overrides"] |= {"trainer.max_epochs": 1}
    short = {
        "data.init_args.batch_size": 4,
        "model.init_args.sampling.max_new_tokens": 12,
        "trainer.max_steps": 4,
    }
    stages["explored"]["overrides"] |= short
    stages["labels"]["label"]["sampling"] = {"max_new_tokens": 12}
    run = settings["run"]["overrides"]
    run |= short
    # What so young a model writes is all malformed: gold would not vary.
    (tmp_path / "golden.py").write_text(
        "def size(completions):\n    return [len(text) for text in completions]\n"
    )
    gold = {"class_path": "FunctionReward", "init_args": {"function": "golden.py:size"}}
    watch = {"every_n_steps": 2, "num_prompts": 8, "max_new_tokens": 12, "gold": gold}
    run["trainer.callbacks"][0]["init_args"] |= watch
    kept = settings["settings"]
    settings["settings"] = {
        "plain": {"coefs": [0.0, 0.1]},
        "worst of three": kept["worst of three"],
        "labelled anew": kept["labelled anew"] | {"coefs": [0.0]},
        "ODIN": kept["ODIN"],
    }
    settings["only"] = ["plain", "worst of three", "labelled anew"]
    (tmp_path / "goodhart.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return tmp_path / "goodhart"


def test_runs_are_trained_measured_and_drawn(program, experiment, here):  # noqa: F811
    code, printed, error = program("goodhart", "--config", "goodhart.yaml")
    assert code == 0, error[-3000:]
    rows = json.loads((experiment / "report/table.json").read_text())
    assert [(row["setting"], row["coef"]) for row in rows] == [
        ("plain", 0.0),
        ("plain", 0.1),
        ("worst of three", 0.0),
        ("labelled anew", 0.0),
    ]
    assert all(row["end_kl"] > 0 for row in rows)
    assert "| worst of three | 0 | 1 |" in printed
    assert not (experiment / "seed_3/odin").exists()  # only what is asked for needs it
    assert (experiment / "report/goodhart.png").read_bytes().startswith(b"\x89PNG")
    used = yaml.safe_load(next(experiment.glob("seed_3/worst_of_three_0/run/**/config.yaml")).read_text())
    assert used["seed_everything"] == used["model"]["init_args"]["seed"] == 3
    assert used["model"]["init_args"]["reward"]["init_args"]["members"][2].endswith("ensemble/model/member_2")
    labelled = [json.loads(line) for line in (experiment / "seed_3/labels/ranked.jsonl").open()]
    assert len(labelled) > 32  # the pairs, and the policy's samples after them
    trained = len(here)
    assert program("goodhart", "--config", "goodhart.yaml")[0] == 0
    assert len(here) == trained  # everything was finished
    code, _, error = program("goodhart", "--config", "goodhart.yaml", '--only=["odin"]')
    assert code == 1
    assert (
        "only names 'odin', which is no setting: known are 'plain', 'worst of three', 'labelled anew', 'ODIN'"
        in error
    )


RECIPE = yaml.safe_load((RECIPES / "experiments/goodhart.yaml").read_text())


@pytest.mark.parametrize(
    "name", [name for name in (*RECIPE["stages"], *RECIPE["settings"]) if name != "labels"]
)
def test_all_of_the_recipe_is_what_fit_understands(name, program, tmp_path):
    stages = {key: TrainingStage(**one) for key, one in RECIPE["stages"].items() if "config" in one}
    run = TrainingStage(**RECIPE["run"])
    made = {key: f"out/{key}" for key in ("output", *RECIPE["stages"])}
    if name in stages:
        stage = seeded_stage(stages[name], 3)
    else:
        stage = run_stage(run, Setting(**RECIPE["settings"][name]), 3, 0.1)
    overrides = filled(stage.overrides, made, name)
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    words = ("fit", "--config", ROOT / stage.config[0], "--config", "overrides.yaml", "--print_config")
    code, printed, error = program(*words)
    assert code == 0, error[-2000:]
    assert yaml.safe_load(printed)["seed_everything"] == 3


def test_its_labels_are_what_label_understands():
    assert RECIPE["stages"]["labels"]["label"].keys() <= signature(label).parameters.keys()


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """Experiments whose stages only note that they were run, two at a time, and may fail."""
    noted = []

    def note(name, stage, plan, folder):
        noted.append(f"{folder.parent.name}/{name}")
        if name.startswith("bad"):
            raise RuntimeError(f"{name} failed")
        time.sleep(0.01)

    (tmp_path / "x.yaml").write_text("{}")
    monkeypatch.setattr(command, "write_sandbox", lambda *_: None)
    monkeypatch.setattr(command, "finish", note)
    monkeypatch.setattr(command, "written_by_monitor", lambda folder: folder)
    monkeypatch.setattr(
        command, "read_run", lambda setting, coef, seed, _: Run(setting, coef, seed, [], [], [])
    )
    monkeypatch.setattr(command, "write", lambda runs, folder: noted.append(runs))
    monkeypatch.setattr(command, "markdown", lambda _: "")

    def run(settings, **more):
        stages = {
            "sft": TrainingStage([str(tmp_path / "x.yaml")], 1),
            "other": TrainingStage([str(tmp_path / "x.yaml")], 1, {"path": "${sft}"}),
        } | more.pop("stages", {})
        training = TrainingStage([str(tmp_path / "x.yaml")], 1, {"path": "${sft}"})
        output = tmp_path / "out"
        given = {"seeds": [1, 2, 3], "jobs": 2, **more}
        command.goodhart(output, coefs=[0.0], stages=stages, run=training, settings=settings, **given)

    return run, noted


def test_two_at_a_time_nothing_comes_before_what_it_needs(trainings):
    run, noted = trainings
    run({"b": Setting(), "a": Setting(coefs=[0.0, 0.1]), "c": Setting()}, only=["a", "b"])
    *done, runs = noted
    assert sorted(done) == [f"seed_{s}/{name}" for s in (1, 2, 3) for name in ("a_0", "a_1", "b_0", "sft")]
    for place, name in enumerate(done):
        assert f"{name.split('/')[0]}/sft" in done[: place + 1]
    expected = [("b", 0.0, s) for s in (1, 2, 3)] + [("a", c, s) for c in (0.0, 0.1) for s in (1, 2, 3)]
    assert [(one.setting, one.coef, one.seed) for one in runs] == expected


def test_what_fails_ends_the_experiment(trainings):
    run, noted = trainings
    with pytest.raises(RuntimeError, match="bad_0 failed"):
        run({"bad": Setting(), **{f"good {n}": Setting() for n in range(50)}})
    assert len(noted) < 100  # of 156


def test_what_cannot_be_is_found_before_anything_is_trained(trainings):
    run, noted = trainings
    with pytest.raises(ValueError, match=r"\$\{stf\} is no earlier stage"):
        run({"a": Setting(), "b": Setting({"path": "${stf}"})})
    with pytest.raises(ValueError, match="stage labels has no judge: an experiment does not wait for people"):
        run({"a": Setting({"path": "${labels}"})}, stages={"labels": LabellingStage({"policy": "${sft}"})})
    with pytest.raises(ValueError, match="only names 'd', which is no setting: known are 'a'"):
        run({"a": Setting()}, only=["d"])
    with pytest.raises(ValueError, match="there is no setting to train"):
        run({"a": Setting()}, only=[])
    with pytest.raises(ValueError, match=r"setting 'a-b' would be trained in a_b_0, which is taken"):
        run({"a b": Setting(), "a-b": Setting()})
    with pytest.raises(ValueError, match=r"\$\{b_0\} is no earlier stage"):  # a policy is no stage
        run({"b": Setting(), "c": Setting({"path": "${b_0}"})})
    for wrong, message in (({"jobs": 0}, "jobs must be at least 1"), ({"seeds": [1, 1]}, "each once, got")):
        with pytest.raises(ValueError, match=message):
            run({"a": Setting()}, **wrong)
    assert noted == []


def test_placeholders_and_names():
    overrides = {"kl": "${coef}", "path": "${sft}", "text": "seed ${seed}", "list": ["${seed}"]}
    assert known(overrides, {"seed": 3, "coef": 0.1}) == {
        "kl": 0.1,
        "path": "${sft}",
        "text": "seed 3",
        "list": [3],
    }
    assert stage_name("annotators' utility", 0) == "annotators_utility_0"
