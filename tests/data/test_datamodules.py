import json

import lightning as L
import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_rlhf.data import PackCollator, PreferenceDataModule, SFTDataModule, tokenize_sft
from tests.data.conftest import make_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DEMONSTRATIONS = [{"prompt": a, "completion": b * (1 + i % 5)} for i, a in enumerate(LETTERS) for b in "xy"]
PAIRS = [{"prompt": a, "chosen": "x", "rejected": "yy"} for a in LETTERS]


class Recorder(L.LightningModule):
    """Learns nothing and remembers the rows it saw."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.seen = []
        self.evaluated = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.row_ids))
        return (self.weight * batch.targets.float().mean()).sum()

    def validation_step(self, batch, batch_idx):
        self.evaluated.extend(batch.row_ids)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return torch.tensor(batch.row_ids)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, **how):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    return L.Trainer(default_root_dir=tmp_path, **{**quiet, **how})


def data(rows=DEMONSTRATIONS):
    return Dataset.from_list(rows)


def test_fit_validate_test_and_predict(tmp_path, tokenizer):
    module = Recorder(tokenizer)
    datamodule = SFTDataModule(
        data(), data(DEMONSTRATIONS[:9]), data(DEMONSTRATIONS[:7]), data(DEMONSTRATIONS[:5])
    )
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, datamodule=datamodule)
    for epoch in (0, 1):
        rows = [row for at, rows in module.seen if at == epoch for row in rows]
        assert sorted(rows) == list(range(52))
        assert rows != sorted(rows)
    assert module.evaluated == [*range(9), *range(9)]
    module.evaluated = []
    run.validate(module, datamodule=datamodule, verbose=False)
    run.test(module, datamodule=datamodule, verbose=False)
    assert module.evaluated == [*range(9), *range(7)]
    predictions = run.predict(module, datamodule=datamodule)
    assert torch.cat(predictions).tolist() == list(range(5))
    assert {split: report.rows for split, report in datamodule.report.items()} == {
        "train": 52,
        "val": 9,
        "test": 7,
        "predict": 5,
    }


def test_the_report_is_printed_once(tmp_path, tokenizer, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, max_epochs=2).fit(Recorder(tokenizer), datamodule=SFTDataModule(data()))
    assert sum("train: 52 rows read from the Dataset given" in message for message in caplog.messages) == 1


def test_without_validation_data(tmp_path, tokenizer):
    module = Recorder(tokenizer)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=PreferenceDataModule(data(PAIRS)))
    assert len(module.seen) == 4
    assert module.evaluated == []


def test_what_is_missing_is_named(tmp_path, tokenizer):
    run = trainer(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="SFTDataModule has no tokenizer: give it one"):
        run.fit(Recorder(), datamodule=SFTDataModule(data()))
    with pytest.raises(ValueError, match=r"SFTDataModule was given no train data, which trainer\.fit needs"):
        run.fit(Recorder(tokenizer), datamodule=SFTDataModule(val=data()))
    with pytest.raises(ValueError, match=r"was given no test data, which trainer\.test needs"):
        run.test(Recorder(tokenizer), datamodule=SFTDataModule(data()))
    with pytest.raises(ValueError, match="on_bad_row is 'ignore'; it must be 'error' or 'drop'"):
        SFTDataModule(data(), on_bad_row="ignore")


def test_a_tokenizer_of_its_own_by_path(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    datamodule = SFTDataModule(data(), tokenizer=str(tmp_path))
    datamodule.setup("fit")
    assert datamodule.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_share_of_the_training_data_for_validation(tokenizer):
    datamodule = SFTDataModule(data(), tokenizer=tokenizer, val_fraction=0.25)
    datamodule.setup("fit")
    shares = [datamodule.datasets[split]["source_row"][:] for split in ("train", "val")]
    assert [len(share) for share in shares] == [39, 13]
    assert sorted(shares[0] + shares[1]) == list(range(52))
    assert datamodule.datasets["val"]["row_id"][:] == list(range(13))
    with pytest.raises(ValueError, match="val_fraction"):
        SFTDataModule(data(), data(), val_fraction=0.1)


def test_splits_by_name(tokenizer, tmp_path):
    DatasetDict({"train": data(), "test": data(DEMONSTRATIONS[:3])}).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    datamodule = SFTDataModule(path, f"{path}:test", tokenizer=tokenizer)
    datamodule.setup("fit")
    assert [len(datamodule.datasets[split]) for split in ("train", "val")] == [52, 3]
    assert not list((tmp_path / "saved").rglob("cache-*"))  # nothing is written beside the user's data


def test_files_are_tokenised_once(tmp_path, tokenizer, monkeypatch):
    from lightning_rlhf.data import tokenized

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))

    def load(tokenizer=tokenizer, **how):
        calls = []
        monkeypatch.setattr(tokenized, "read_example", lambda *row: calls.append(row) or original(*row))
        datamodule = SFTDataModule(str(path), tokenizer=tokenizer, **how)
        datamodule.setup("fit")
        return len(calls), datamodule.fingerprint("train"), datamodule.datasets["train"].to_list()

    original = tokenized.read_example
    first, again = load(), load()
    assert (first[0], again[0]) == (52, 0)
    assert first[1:] == again[1:]
    assert load(tokenizer=make_tokenizer())[0] == 0  # equal, though another object
    for change in ({"max_length": 2}, {"loss_on": "all"}, {"tokenizer": make_tokenizer(bos_token="<b>")}):
        calls, fingerprint, _ = load(**change)
        assert calls == 52
        assert (fingerprint == first[1]) == ("tokenizer" in change)  # of ids, and BOS is none of them
    path.write_text(path.read_text().replace('"a"', '"z"'))
    assert load()[1] != first[1]


def test_the_evaluation_loader_is_complete_and_in_order(tokenizer):
    datamodule = PreferenceDataModule(data(PAIRS), tokenizer=tokenizer, batch_size=4, drop_last=True)
    datamodule.setup("fit")
    for batch_size, count in ((None, 7), (5, 6)):
        found = list(datamodule.evaluation_loader("train", batch_size))
        assert len(found) == count
        assert [row for batch in found for row in batch.row_ids] == list(range(26))


@pytest.mark.parametrize(
    "how", [{"max_tokens": 20}, {"batch_size": 5, "length_grouped": True}, {"drop_last": True}]
)
def test_batches_as_asked_for(tokenizer, how):
    datamodule = SFTDataModule(data(), tokenizer=tokenizer, **how)
    datamodule.setup("fit")
    for batch in datamodule.train_dataloader():
        assert batch.num_groups <= how.get("batch_size", 8 if "max_tokens" not in how else 20)
        assert "max_tokens" not in how or batch.input_ids.numel() <= 20
        assert "drop_last" not in how or batch.num_groups == 8


def test_overfit_batches_repeats_the_same(tmp_path, tokenizer):
    module = Recorder(tokenizer)
    trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(module, datamodule=SFTDataModule(data()))
    assert [rows for _, rows in module.seen] == [tuple(range(8)), tuple(range(8, 16))] * 2


def test_overfit_batches_validates_on_as_many(tmp_path, tokenizer):
    module = Recorder(tokenizer)
    datamodule = SFTDataModule(data(), data(DEMONSTRATIONS[:20]))
    trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(module, datamodule=datamodule)
    assert module.evaluated == [*range(16)] * 2


def test_a_plain_loader_over_tokenised_rows(tmp_path, tokenizer):
    rows, _ = tokenize_sft(data(), tokenizer)
    module = Recorder()
    trainer(tmp_path, max_epochs=1).fit(module, DataLoader(rows, batch_size=13, collate_fn=PackCollator()))
    assert [rows for _, rows in module.seen] == [tuple(range(i, i + 13)) for i in range(0, 52, 13)]


def test_lightning_cli(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    arguments = [
        "--data=PreferenceDataModule",
        f"--data.train={tmp_path / 'rows.jsonl'}",
        "--data.max_tokens=30",
    ]
    arguments += [
        f"--data.tokenizer={tmp_path / 'tokenizer'}",
        "--data.on_bad_row=drop",
        "--data.val_fraction=0.1",
    ]
    cli = LightningCLI(
        Recorder,
        L.LightningDataModule,
        subclass_mode_data=True,
        args=arguments,
        run=False,
        save_config_callback=None,
    )
    cli.datamodule.setup("fit")
    assert cli.datamodule.report["train"].rows == 23
    assert cli.datamodule.max_tokens == 30
