"""`lightning-rlhf sandbox` as a whole, at its real size."""

import json
from inspect import signature

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf.cli.main import main
from lightning_rlhf.data import PreferenceDataModule, SFTDataModule
from lightning_rlhf.sandbox import create_sandbox

COUNTS = {name: parameter.default for name, parameter in signature(create_sandbox).parameters.items()}
ROWS = {
    "sft_train": (COUNTS["num_demonstrations"], {"prompt", "completion"}),
    "sft_val": (COUNTS["num_val"], {"prompt", "completion"}),
    "preferences_train": (COUNTS["num_pairs"], {"prompt", "chosen", "rejected"}),
    "preferences_val": (COUNTS["num_val"], {"prompt", "chosen", "rejected"}),
    "prompts_val": (COUNTS["num_val"], {"prompt"}),
}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the command writes with seed 1; no test changes it."""
    folder = tmp_path_factory.mktemp("written") / "sandbox"
    main(["sandbox", "--output", str(folder), "--seed", "1"])
    return folder


def test_it_writes_a_model_and_data_that_the_modules_read(written):
    names = {"model", "sandbox.json", *(f"{name}.jsonl" for name in ROWS)}
    assert {path.name for path in written.iterdir()} == names
    for name, (count, columns) in ROWS.items():
        found = rows(written, name)
        assert len(found) == count
        assert all(set(row) == columns for row in found)
    description = json.loads((written / "sandbox.json").read_text())
    assert description["seed"] == 1
    assert description["annotator"]["agreement"] == pytest.approx(0.78, abs=0.01)
    assert AutoModelForCausalLM.from_pretrained(written / "model").num_parameters() < 500_000
    tokenizer = AutoTokenizer.from_pretrained(written / "model")
    for datamodule in (
        SFTDataModule(str(written / "sft_val.jsonl"), tokenizer=tokenizer),
        PreferenceDataModule(str(written / "preferences_val.jsonl"), tokenizer=tokenizer),
    ):
        datamodule.setup("fit")
        assert len(datamodule.datasets["train"]) == COUNTS["num_val"]
        assert datamodule.report["train"].dropped == {}


def test_no_validation_prompt_is_trained_on(written):
    asked = {row["prompt"] for name in ("sft_train", "preferences_train") for row in rows(written, name)}
    for name in ("sft_val", "preferences_val", "prompts_val"):
        assert not asked & {row["prompt"] for row in rows(written, name)}


def test_the_seed_decides_every_byte_and_a_folder_in_use_is_kept(program, written, tmp_path):
    code, printed, error = program("sandbox", "--seed", "1")  # --output is sandbox by default
    assert code == 0, error
    assert printed.startswith("wrote sandbox: model, preferences_train.jsonl, ")
    assert contents(tmp_path / "sandbox") == contents(written)

    code, _, error = program("sandbox", "--seed", "2")
    assert code == 1
    assert "sandbox exists already" in error
    assert "--overwrite" in error
    assert contents(tmp_path / "sandbox") == contents(written)

    (tmp_path / "sandbox" / "old").write_text("of the run before")
    assert program("sandbox", "--seed", "2", "--overwrite")[0] == 0
    again = contents(tmp_path / "sandbox")
    assert again.keys() == contents(written).keys()
    same = {str(path) for path, content in contents(written).items() if again[path] == content}
    assert same.isdisjoint({"sandbox.json", "model/model.safetensors", *(f"{name}.jsonl" for name in ROWS)})
    assert [path.name for path in tmp_path.iterdir()] == ["sandbox"]
