import importlib
import signal
import subprocess
import sys

import pytest
import yaml
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_rlhf import __version__
from lightning_rlhf.cli import main as program_module
from lightning_rlhf.cli.main import COMMANDS

BASE = {
    "model": {
        "class_path": "DPO",
        "init_args": {
            "policy": {"path": "nowhere"},
            "objective": {"class_path": "Sigmoid", "init_args": {"beta": 0.1, "label_smoothing": 0.0}},
            "optimization": {"lr": 1e-5},
        },
    },
    "data": {"class_path": "PreferenceDataModule", "init_args": {"train": "nowhere.jsonl"}},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump({"model": BASE["model"]}))
    return path


def settings(printed):
    return yaml.safe_load(printed)["model"]["init_args"]


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from lightning_rlhf.cli.main import main; main(['--help']); print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, modules = done.stdout.splitlines()
    assert all(any(line.startswith(f"  {name} ") for line in text) for name in COMMANDS)
    assert not {"torch", "lightning", "transformers", "jsonargparse", "yaml"} & set(modules.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists(name):
    module, _, function = COMMANDS[name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_version_and_no_command(program):
    assert program("--version") == (0, f"lightning-rlhf {__version__}\n", "")
    assert program()[1].startswith("usage: lightning-rlhf COMMAND")


def test_an_unknown_command_suggests_one(program):
    code, _, error = program("quickstrat")
    assert code == 2
    assert "no command 'quickstrat' (did you mean quickstart?)" in error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("bad value"), 1, "error: bad value\n"),
        (FileNotFoundError("no model at 'x'"), 1, "error: no model at 'x'\n"),
        (RuntimeError("the loss is nan"), 1, "error: RuntimeError: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_message(program, monkeypatch, error, code, text):
    def fail(arguments):
        raise error

    monkeypatch.setattr(program_module, "fail", fail, raising=False)
    monkeypatch.setitem(COMMANDS, "fit", "lightning_rlhf.cli.main:fail")
    found, _, printed = program("fit")
    assert found == code
    assert text in printed
    assert "Traceback" not in printed
    if code == 1:
        with pytest.raises(type(error)):
            program("fit", "--debug")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training_is_no_success(program, monkeypatch, tmp_path, number, code):
    class Stopped(BoringModel):
        def on_train_batch_end(self, *_):
            signal.raise_signal(number)

    def fit(arguments):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        Trainer(max_steps=3, accelerator="cpu", default_root_dir=tmp_path, **quiet).fit(Stopped())

    # A shell starts what it runs in the background with SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(program_module, "fail", fit, raising=False)
    monkeypatch.setitem(COMMANDS, "fit", "lightning_rlhf.cli.main:fail")
    found, _, printed = program("fit")
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored.
    assert found == code
    assert "Traceback" not in printed


def test_flags_and_yaml_reach_nested_settings(program, config):
    flags = ["--model.policy.path", "X", "--model.policy.lora.r", "8", "--model.objective.beta", "0.3"]
    code, printed, _ = program(
        "fit", "--config", config, *flags, "--model.optimization.lr", "1e-3", "--print_config"
    )
    found = settings(printed)
    assert code == 0
    assert (found["policy"]["path"], found["policy"]["lora"]["r"]) == ("X", 8)
    assert found["objective"]["init_args"].items() >= {"beta": 0.3, "label_smoothing": 0.0}.items()
    assert found["optimization"]["lr"] == 1e-3


def test_a_policy_may_be_a_path_alone(program):
    _, printed, _ = program("fit", "--model", "SFT", "--model.policy", "some/path", "--print_config")
    assert settings(printed)["policy"] == "some/path"


@pytest.mark.parametrize("content", ["", "null", '[{"prompt": "a", "completion": "b"}]', "lr: 1"])
def test_a_file_of_rows_is_not_read_as_settings(program, tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    flags = ["--model", "SFT", "--model.policy", "some/path", "--data", "SFTDataModule"]
    code, printed, _ = program(
        "fit", *flags, "--data.train", "rows.json", "--data.val", "rows.json", "--print_config"
    )
    assert code == 0
    found = yaml.safe_load(printed)["data"]["init_args"]
    assert (found["train"], found["val"]) == ("rows.json", "rows.json")


def test_later_configurations_override_key_by_key(program, config, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {policy: {lora: {r: 4}}, objective: {init_args: {beta: 0.5}}}}")
    _, printed, _ = program("fit", "--config", config, "-c", overlay, "--print_config")
    found = settings(printed)
    assert (found["policy"]["path"], found["policy"]["lora"]["r"]) == ("nowhere", 4)
    assert found["objective"]["init_args"].items() >= {"beta": 0.5, "label_smoothing": 0.0}.items()
    assert found["optimization"]["lr"] == 1e-5


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.objective.betta", "unknown key 'betta' in model.objective (did you mean 'beta'?)"),
        ("--model.optimization.lrr", "unknown key 'lrr' in model.optimization (did you mean 'lr'?)"),
        ("--model.policy.lora.q", "unknown key 'q' in model.policy.lora"),
        ("--trainer.max_epoch", "max_epoch"),
    ],
)
def test_a_typo_in_a_flag_is_named(program, config, flag, message):
    code, _, error = program("fit", "--config", config, flag, "0.5")
    assert code == 2
    assert message in error.splitlines()[0]


@pytest.mark.parametrize(
    ("where", "key"),
    [
        (("model", "init_args", "optimization"), "learning_rate"),
        ((), "trainr"),
        (("model", "init_args"), "polici"),
    ],
)
def test_a_typo_in_yaml_is_named(program, tmp_path, where, key):
    values = yaml.safe_load(yaml.safe_dump({"model": BASE["model"]}))
    place = values
    for name in where:
        place = place[name]
    place[key] = 1
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(values))
    code, _, error = program("fit", "--config", tmp_path / "typo.yaml")
    assert code == 2
    assert key in error.splitlines()[0]


def test_a_missing_configuration_is_named(program):
    code, _, error = program("fit", "--config", "nothing.yaml")
    assert code == 2
    assert "nothing.yaml" in error


def test_a_weighted_sum_of_objectives_in_yaml(program, tmp_path):
    """Short class names, nested; printed settings build the same objective again."""
    parts = [{"class_path": "IPO", "init_args": {"beta": 0.2}}, {"class_path": "SFTTerm"}]
    objective = {"class_path": "Weighted", "init_args": {"objectives": parts, "weights": [1.0, 0.3]}}
    model = {
        "class_path": "DPO",
        "init_args": {**BASE["model"]["init_args"], "objective": objective},
    }
    path = tmp_path / "sum.yaml"
    path.write_text(yaml.safe_dump({"model": model}))
    code, printed, error = program("fit", "--config", path, "--print_config")
    assert code == 0, error
    from lightning_rlhf.objectives import IPO, Objective, SFTTerm, Weighted

    expected = Weighted([IPO(beta=0.2), SFTTerm()], [1.0, 0.3])
    assert Objective.from_config(settings(printed)["objective"]) == expected
