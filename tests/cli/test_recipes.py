import json
from pathlib import Path

import pytest
import torch
import yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PREFERENCES = "preferences_train.jsonl"
DATA = {"sft": "sft_train.jsonl", **dict.fromkeys(("dpo", "ipo", "orpo", "simpo"), PREFERENCES)}
ALGORITHMS = {recipe: "SFT" if recipe == "sft" else "DPO" for recipe in DATA}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory, llama_dir):
    """What the tiny overlay reads, smaller than `lightning-rlhf sandbox` makes it."""
    folder = tmp_path_factory.mktemp("world") / "sandbox"
    folder.mkdir()
    (folder / "model").symlink_to(llama_dir)
    rows = [
        {"prompt": f"tell me {n}:", "completion": f" ok {n}", "chosen": f" yes {n}.", "rejected": " no"}
        for n in range(40)
    ]
    columns = {DATA["sft"]: ("prompt", "completion"), PREFERENCES: ("prompt", "chosen", "rejected")}
    for file, names in columns.items():
        picked = [{column: row[column] for column in names} for row in rows]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in picked))
    return folder


@pytest.fixture
def arguments(sandbox, tmp_path):
    """Arguments of a recipe with the tiny overlay and others."""

    def make(recipe, *overlays, steps=2):
        (tmp_path / "sandbox").exists() or (tmp_path / "sandbox").symlink_to(sandbox)
        paths = [
            RECIPES / f"{recipe}.yaml",
            *(RECIPES / "overlays" / f"{o}.yaml" for o in ("tiny", *overlays)),
        ]
        words = [word for path in paths for word in ("--config", path)]
        return [*words, "--data.train", f"sandbox/{DATA[recipe]}", "--trainer.max_steps", steps]

    return make


def checkpoint(folder):
    (path,) = folder.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    return path


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
@pytest.mark.parametrize(
    "overlays", [(), ("lora",), ("qlora",)], ids=lambda names: "+".join(names) or "plain"
)
def test_every_recipe_trains_and_is_exported(program, arguments, tmp_path, recipe, overlays):
    code, _, error = program("fit", *arguments(recipe, *overlays))
    assert code == 0, error[-2000:]
    saved = torch.load(checkpoint(tmp_path), weights_only=True)
    assert saved["global_step"] == 2
    assert saved["algorithm"] == ALGORITHMS[recipe]
    assert "random_states" in saved
    assert (
        yaml.safe_load((tmp_path / "lightning_logs/version_0/config.yaml").read_text())["trainer"][
            "max_steps"
        ]
        == 2
    )
    code, printed, error = program("export", checkpoint(tmp_path), "--output", "out", "--merge")
    assert code == 0, error
    assert ALGORITHMS[recipe] in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_doctor_shows_what_will_happen_and_saves_nothing(program, arguments, tmp_path, recipe):
    words = arguments(recipe, "lora")
    code, printed, error = program("doctor", *words)
    assert code == 0, error[-2000:]
    for text in (
        "prompt",
        "learned from",
        "policy adapter",
        "layout",
        "loss",
        "tokens computed",
        "one optimizer step",
    ):
        assert text in printed
    assert ("base without its adapter" in printed) == (recipe == "dpo")
    assert [path.name for path in tmp_path.iterdir()] == ["sandbox"]


def test_a_checkpoint_of_another_algorithm_is_refused(program, arguments, tmp_path):
    program("fit", *arguments("sft"))
    code, _, error = program("fit", *arguments("dpo"), "--ckpt_path", checkpoint(tmp_path))
    assert code == 1
    assert "this is a checkpoint of SFT, not of DPO" in error


def test_a_missing_model_is_named(program, arguments):
    code, _, error = program("fit", *arguments("dpo"), "--model.policy.path", "no/such")
    assert code == 1
    assert "at 'no/such'" in error
    assert "hf download" in error


def test_predict_writes_one_line_a_row(program, arguments, tmp_path):
    code, _, error = program(
        "predict", *arguments("dpo"), "--data.predict", "sandbox/preferences_train.jsonl"
    )
    assert code == 0, error[-2000:]
    (path,) = tmp_path.rglob("predictions.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(40))
    assert all(len(line["values"]) == 2 for line in lines)


def test_a_weighted_sum_trains_and_says_what_it_needs(program, arguments, tmp_path):
    parts = [{"class_path": "SimPO"}, {"class_path": "SFTTerm", "init_args": {"average": "sequences"}}]
    objective = {"class_path": "Weighted", "init_args": {"objectives": parts, "weights": [1.0, 0.3]}}
    path = tmp_path / "sum.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": {"objective": objective}}}))
    code, _, error = program("fit", *arguments("simpo"), "--config", path)
    assert code == 0, error[-2000:]
    saved = torch.load(checkpoint(tmp_path), weights_only=True)["hyper_parameters"]["objective"]
    assert [part["class_path"].rsplit(".", 1)[1] for part in saved["init_args"]["objectives"]] == [
        "SimPO",
        "SFTTerm",
    ]
    code, printed, error = program("doctor", *arguments("simpo"))
    assert code == 0, error[-2000:]
    assert "none: SimPO needs none" in printed
