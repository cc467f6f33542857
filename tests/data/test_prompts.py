"""Prompts without completions, and the columns that travel along."""

import json

import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_rlhf.data import PromptBatch, PromptCollator, PromptDataModule, SFTDataModule, tokenize_prompts
from lightning_rlhf.data.formats import BadRow, recognise
from lightning_rlhf.data.prompt_only import read_prompt
from tests.data.conftest import CHATML, make_tokenizer
from tests.data.test_datamodules import Recorder, trainer

USER, SAYS = {"role": "user", "content": "the sky"}, {"role": "assistant", "content": "is blue"}
ROWS = [{"prompt": "the sky" * (1 + i % 5), "answer": i} for i in range(52)]


class Sampler(Recorder):
    """Sees prompts instead of completions."""

    def training_step(self, batch, batch_idx):
        assert isinstance(batch, PromptBatch)
        assert batch.columns["answer"] == list(batch.row_ids)
        self.seen.append((self.current_epoch, batch.row_ids))
        return self.weight.sum()


def batch_of(rows, tokenizer, **how):
    made, report = tokenize_prompts(Dataset.from_list(rows), tokenizer, **how)
    return PromptCollator()(made[:]), report


def test_text_and_any_column(tokenizer):
    rows = [
        {
            "prompt": "the sky",
            "answer": 4,
            "tests": [{"in": [1], "out": "1"}],
            "prompt_ids": "mine",
            "note": None,
        },
        {"prompt": " is blue", "answer": 5, "tests": [], "prompt_ids": "too", "note": "x"},
    ]
    batch, report = batch_of(rows, tokenizer)
    assert len(batch) == 2
    assert list(batch.prompt_ids) == [tokenizer(row["prompt"])["input_ids"] for row in rows]
    assert batch.texts == batch.prompts == ("the sky", " is blue")
    assert batch.columns == {
        name: [row[name] for row in rows] for name in ("answer", "tests", "prompt_ids", "note")
    }
    assert batch.row_ids == (0, 1)
    assert report.tokens == sum(map(len, batch.prompt_ids))
    assert batch.to("cpu") is batch


def test_no_other_column(tokenizer):
    batch, _ = batch_of([{"prompt": "the sky"}], tokenizer)
    assert batch.columns == {}


def test_a_list_of_rows_and_a_dictionary_of_columns_are_the_same(tokenizer):
    made, _ = tokenize_prompts(Dataset.from_list(ROWS[:6]), tokenizer)
    one, other = PromptCollator()(made[:]), next(iter(DataLoader(made, 6, collate_fn=PromptCollator())))
    assert vars(one) == vars(other)


def test_the_generation_prompt_of_a_chat_template(chat):
    batch, _ = batch_of([{"prompt": [USER], "system": "be kind"}], chat)
    assert batch.texts == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nthe sky<|im_end|>\n<|im_start|>assistant\n",
    )
    assert chat.decode(batch.prompt_ids[0]) == batch.texts[0]
    assert batch.prompts == ([{"role": "system", "content": "be kind"}, USER],)


def test_an_answer_that_is_begun_is_continued(chat):
    batch, _ = batch_of([{"prompt": [USER, {**SAYS, "content": "is"}]}], chat)
    assert batch.texts[0].endswith("<|im_start|>assistant\nis")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [SAYS], "rejected": [{**SAYS, "content": "no"}]},
        {"prompt": "the sky", "chosen": [SAYS], "rejected": [SAYS]},
        {"prompt": "the sky", "completions": [[SAYS], [SAYS]]},
        {"chosen": [USER, SAYS], "rejected": [USER, {**SAYS, "content": "no"}]},
    ],
)
def test_data_of_other_tasks(chat, row):
    """The prompt is the one that the other datamodules have; a text beside messages is the user's turn."""
    batch, _ = batch_of([row], chat)
    assert batch.prompts == ([USER],)
    assert batch.columns == {name: [value] for name, value in row.items() if name != "prompt"}


def test_the_same_ids_as_the_prompts_of_demonstrations(tokenizer):
    rows = Dataset.from_list(
        [{"prompt": f"Human: what is {i}? Assistant:", "completion": " a cat"} for i in range(9)]
    )
    mine, other = PromptDataModule(rows, tokenizer=tokenizer), SFTDataModule(rows, tokenizer=tokenizer)
    mine.setup("fit")
    other.setup("fit")
    assert mine.datasets["train"]["prompt_ids"][:] == other.datasets["train"]["prompt_ids"][:]


def test_long_prompts_are_cut_from_the_left_and_counted():
    tokenizer = make_tokenizer(add_bos=True)
    long = "the sea is green and the sky is blue"
    batch, report = batch_of([{"prompt": long}, {"prompt": "the"}], tokenizer, max_prompt_length=5)
    whole = tokenizer(long)["input_ids"]
    assert batch.prompt_ids[0] == [whole[0], *whole[-4:]]
    assert batch.texts[0] == long
    assert report.prompts_truncated == 1


def test_prompts_without_room_are_errors_or_dropped_and_counted(tokenizer):
    rows = [{"prompt": "the sky"}, {"prompt": "0123456789"}]
    with pytest.raises(ValueError, match="row 2: column 'prompt' has .* leaves no room .*max_length"):
        batch_of(rows, tokenizer, max_length=5)
    batch, report = batch_of(rows, tokenizer, max_length=5, on_bad_row="drop")
    assert batch.texts == ("the sky",)
    assert report.dropped == {"prompt too long": 1}


def test_an_empty_prompt_is_the_start_token_or_an_error():
    tokenizer = make_tokenizer()
    batch, _ = batch_of([{"prompt": ""}], tokenizer)
    assert batch.prompt_ids == ([tokenizer.bos_token_id],)
    with pytest.raises(ValueError, match="column 'prompt' is empty, and the tokenizer has no BOS"):
        batch_of([{"prompt": ""}], make_tokenizer(bos_token=None))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "column 'prompt' has no value"),
        ({"prompt": 3}, "column 'prompt' is of type int; it must be text or a list of messages"),
        ({"prompt": []}, "column 'prompt' has no message"),
        ({"prompt": [{"content": "x"}]}, "has a message with content; it needs 'role'"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(BadRow, match=message):
        read_prompt(row, ("prompt",))


def test_a_bad_row_is_named_or_counted(tmp_path, tokenizer):
    lines = [json.dumps({"prompt": prompt, "answer": 1}) for prompt in ("the", None, "sky")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="rows.jsonl, row 2: column 'prompt' has no value"):
        PromptDataModule(path, tokenizer=tokenizer).setup("fit")
    datamodule = PromptDataModule(path, tokenizer=tokenizer, on_bad_row="drop", batch_size=2)
    datamodule.setup("fit")
    assert datamodule.report["train"].dropped == {"missing value": 1}
    (batch,) = datamodule.evaluation_loader("train")
    assert (batch.texts, batch.row_ids) == (("the", "sky"), (0, 1))


def test_columns_are_recognised_and_missing_ones_named():
    assert recognise(["answer", "prompt", "chosen"], "prompt") == ("prompt",)
    with pytest.raises(ValueError, match="For prompts it needs prompt, or chosen . rejected. Is 'prompts'"):
        recognise(["prompts", "answer"], "prompt")
    with pytest.raises(ValueError, match="Is 'chosn' a misspelling of 'chosen'"):
        recognise(["prompt", "chosn", "rejected"], "preference")


def test_template_that_is_missing_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="has no chat template"):
        batch_of([{"prompt": [USER]}], tokenizer)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", [{}, {"max_tokens": 40, "length_grouped": True}], ids=["rows", "tokens"])
def test_a_resumed_run_sees_what_the_other_would_have_seen(tmp_path, tokenizer, workers, how):
    def fit(callbacks=(), ckpt_path=None):
        module = Sampler(tokenizer)
        run = trainer(tmp_path, max_epochs=3, callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
        datamodule = PromptDataModule(Dataset.from_list(ROWS), seed=5, num_workers=workers, **how)
        run.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        return module.seen

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    whole = fit([saver])
    assert sorted(row for epoch, rows in whole for row in rows if epoch == 1) == list(range(52))
    assert fit(ckpt_path=tmp_path / "step=10.ckpt") == whole[10:]


def test_held_out_prompts_keep_their_columns(tokenizer):
    datamodule = PromptDataModule(Dataset.from_list(ROWS), tokenizer=tokenizer, val_fraction=0.25)
    datamodule.setup("fit")
    answers = {
        split: [a for batch in datamodule.evaluation_loader(split) for a in batch.columns["answer"]]
        for split in ("train", "val")
    }
    assert len(answers["val"]) == 13
    assert sorted(answers["train"] + answers["val"]) == list(range(52))


def test_all_precisions_hand_the_batch_on_unchanged(tmp_path, chat):
    chat = make_tokenizer(chat_template=CHATML)
    rows = Dataset.from_list([{"prompt": [USER], "answer": i} for i in range(4)])
    for precision in ("bf16-true", "bf16-mixed"):
        module = Sampler(chat)
        run = trainer(tmp_path, max_epochs=1, precision=precision)
        run.fit(module, datamodule=PromptDataModule(rows, batch_size=2))
        assert len(module.seen) == 2
        assert torch.isfinite(module.weight).all()
