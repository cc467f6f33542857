"""A sandbox on disk."""

import json

import pytest
from datasets import load_dataset

from lightning_rlhf.sandbox import Annotator, Sandbox, World, create_sandbox

SMALL = {"num_demonstrations": 40, "num_pairs": 30, "num_val": 10}
COLUMNS = {
    "sft_train": (40, ["prompt", "completion"]),
    "sft_val": (10, ["prompt", "completion"]),
    "preferences_train": (30, ["prompt", "chosen", "rejected"]),
    "preferences_val": (10, ["prompt", "chosen", "rejected"]),
    "prompts_val": (10, ["prompt"]),
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    return create_sandbox(tmp_path_factory.mktemp("sandbox"), seed=5, **SMALL)


def _contents(sandbox):
    return {
        p.relative_to(sandbox.directory): p.read_bytes() for p in sandbox.directory.rglob("*") if p.is_file()
    }


def test_everything_is_there(sandbox):
    assert sandbox == Sandbox.at(sandbox.directory)
    assert {p.name for p in sandbox.directory.iterdir()} == {
        "model",
        "sandbox.json",
        *(f"{name}.jsonl" for name in COLUMNS),
    }
    model = {p.name for p in sandbox.model.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= model


@pytest.mark.parametrize("name", COLUMNS)
def test_rows_are_what_datasets_reads(sandbox, name, tmp_path):
    path = getattr(sandbox, name)
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert (len(rows), rows.column_names) == COLUMNS[name]


def test_rows_and_description_are_the_worlds(sandbox):
    world = World(seed=5)
    annotator = Annotator(world)
    rows = [json.loads(line) for line in sandbox.preferences_val.read_text().splitlines()]
    assert rows == world.preferences(10, annotator, "val")
    said = json.loads(sandbox.description.read_text())
    assert said["seed"] == 5
    assert said["annotator"]["agreement"] == annotator.agreement
    assert said["annotator"]["best_accuracy"] == annotator.best_accuracy
    assert said["gold"]["token_budget"] == 40


def test_the_model_is_as_deep_as_asked_for(sandbox, tmp_path):
    deeper = create_sandbox(tmp_path, num_layers=3, **SMALL)
    layers = [
        json.loads((s.model / "config.json").read_text())["num_hidden_layers"] for s in (sandbox, deeper)
    ]
    assert layers == [2, 3]


def test_the_same_seed_writes_the_same_bytes(sandbox, tmp_path):
    assert _contents(create_sandbox(tmp_path / "a" / "b", seed=5, **SMALL)) == _contents(sandbox)


def test_a_directory_in_use_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty.*set overwrite"):
        create_sandbox(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_its_own_files_only(sandbox, tmp_path):
    create_sandbox(tmp_path, seed=6, **SMALL)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        create_sandbox(tmp_path, seed=5, **SMALL)
    replaced = create_sandbox(tmp_path, seed=5, **SMALL, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (tmp_path / "thesis.txt").unlink()
    assert _contents(replaced) == _contents(sandbox)


def _full(*_):
    raise OSError("no space left")


def test_what_was_interrupted_has_no_description(tmp_path, monkeypatch):
    (tmp_path / "sandbox.json").write_text("{}")
    monkeypatch.setattr("lightning_rlhf.sandbox.create._write_model", _full)
    with pytest.raises(OSError, match="no space left"):
        create_sandbox(tmp_path, **SMALL, overwrite=True)
    assert not (tmp_path / "sandbox.json").exists()
