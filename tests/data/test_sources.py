import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from lightning_rlhf.data.sources import _explain_json, load_rows, rename_columns

ROWS = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "dir", "dict:test", "files", "memory"]
)
def test_every_kind_of_source_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    rows = Dataset.from_list(ROWS)
    if kind == "jsonl":
        path.write_text(LINES)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(LINES.encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        rows.to_csv(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "dir":
        rows.save_to_disk(path)
    elif kind == "dict:test":
        DatasetDict({"train": Dataset.from_list([{"text": "x"}]), "test": rows}).save_to_disk(
            tmp_path / "rows.dict"
        )
    elif kind == "files":
        path.mkdir()
        (path / "train.jsonl").write_text(LINES)
    source = rows if kind == "memory" else str(path)
    assert load_rows(source).to_list() == ROWS


def test_the_split_follows_the_stage():
    splits = DatasetDict({name: Dataset.from_list([{"text": name}]) for name in ("train", "test")})
    assert load_rows(splits, "train")["text"][0] == "train"
    assert load_rows(splits, "val")["text"][0] == "test"
    with pytest.raises(
        ValueError, match="has the splits a, b, none of them train; name one: the DatasetDict:a"
    ):
        load_rows(DatasetDict({"a": splits["train"], "b": splits["test"]}))


def test_a_missing_file_names_what_is_there(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    with pytest.raises(
        FileNotFoundError, match=r"trian\.jsonl: no such file; its directory has train\.jsonl"
    ):
        load_rows(tmp_path / "trian.jsonl")
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        load_rows(str(tmp_path / "nowhere"))


def test_unknown_kind_of_file(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.txt: unknown kind of file; known are \.jsonl"):
        load_rows(write(tmp_path / "rows.txt", "hi"))


@pytest.mark.parametrize("text", ["", "\n\n"])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_an_empty_file(tmp_path, text, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    with pytest.raises(ValueError, match=rf"rows\.{suffix} is empty; it must hold at least one row"):
        load_rows(path)


def test_a_csv_with_only_a_header_is_empty(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.csv is empty"):
        load_rows(write(tmp_path / "rows.csv", "text\n"))


def test_a_truncated_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"text": str(i) * 50}) + "\n" for i in range(5000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"rows\.jsonl\.gz: the gzip stream is cut off or damaged after row \d+"
    ):
        load_rows(path)


def test_a_file_that_is_no_gzip(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz"):
        load_rows(write(tmp_path / "rows.jsonl.gz", LINES))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_invalid_json_names_the_row(tmp_path, suffix):
    text = LINES + '{"text": "four\n'
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    with pytest.raises(
        ValueError, match=rf"rows\.{suffix}, row 4: invalid JSON .*Correct or delete this line"
    ):
        load_rows(path)


def test_invalid_json_document_names_the_line(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.json, line 2: invalid JSON"):
        load_rows(write(tmp_path / "rows.json", '[{"text": "a"},\n{"text" "b"}]'))


def test_a_column_that_changes_its_type_is_read_or_named(tmp_path):
    # Which of both depends on the release of datasets: from 5 on it reads such columns, and rows are checked later.
    text = '{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n'
    path = write(tmp_path / "rows.jsonl", text)
    with pytest.raises(
        ValueError, match=r"rows\.jsonl, row 2: column 'prompt' is a list here and text before"
    ):
        _explain_json(path, ValueError())


def test_a_row_that_is_no_object(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: a list, not an object of columns"):
        load_rows(write(tmp_path / "rows.jsonl", '{"text": "a"}\n[1, 2]\n'))


def test_no_network_and_not_in_the_cache():
    with pytest.raises(
        FileNotFoundError, match="someone/nothing: no such file or directory, and as a data set of the"
    ):
        load_rows("someone/nothing")


def test_a_directory_of_nothing(tmp_path):
    with pytest.raises(
        ValueError, match="neither saved by datasets' save_to_disk nor a directory of data files"
    ):
        load_rows(tmp_path)


def test_renaming():
    rows = Dataset.from_list([{"question": "q", "answer": "a", "prompt": "old"}])
    names = {"question": "prompt", "answer": "completion"}
    assert rename_columns(rows, names).to_list() == [{"prompt": "q", "completion": "a"}]
    with pytest.raises(
        ValueError, match="the Dataset has no column 'qestion' to rename; it has question, answer"
    ):
        rename_columns(rows, {"qestion": "prompt"})
