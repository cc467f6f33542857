"""Trains on two processes and writes down which rows each of them saw. Run by test_ddp."""

import json
import sys
from pathlib import Path

import lightning as L
import torch

from lightning_rlhf import data
from tests.data.conftest import make_tokenizer


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = make_tokenizer()
        self.seen = {"train": [], "val": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch.row_ids)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch.row_ids)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch.row_ids)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rows = str(folder / "rows.jsonl")
    for name in sys.argv[2:]:
        module = Recorder()
        datamodule = getattr(data, name)(rows, rows, predict=rows, max_tokens=40, batch_size=4)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=1,
            logger=False,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=datamodule)
        trainer.predict(module, datamodule=datamodule, return_predictions=False)
        (folder / f"{name}.{trainer.global_rank}.json").write_text(json.dumps(module.seen))
