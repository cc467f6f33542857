"""Where rows come from: the Hub, a directory, a file or a ``datasets.Dataset`` in memory."""

import gzip
import json
import zlib
from collections.abc import Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import IO, Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

BUILDERS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# A datamodule's split and the names it goes by, best first.
SPLIT_NAMES = {
    "train": ("train",),
    "val": ("validation", "val", "valid", "dev", "eval", "test"),
    "test": ("test", "validation", "val"),
    "predict": ("predict", "test", "validation", "val"),
}


def load_rows(source: str | PathLike[str] | Dataset | DatasetDict, split: str = "train") -> Dataset:
    """Rows of a data source.

    Args:
        source: A file (``.jsonl``, ``.jsonl.gz``, ``.json``, ``.csv`` or ``.parquet``), a directory saved by
            ``datasets`` or holding such files, a Hub id, or a ``Dataset``. ``:split`` after a directory or Hub id
            names one of its splits: ``"trl-lib/ultrafeedback_binarized:test"``.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``: which split is taken where the source has
            several and names none.

    Returns:
        The rows, memory-mapped where they come from disk.

    Raises:
        FileNotFoundError: If a file does not exist, or the Hub has no such data set or cannot be reached.
        ValueError: If a file is empty, cut off or no valid JSON, a column changes its type, or a split is unknown.

    Example:
        >>> load_rows(Dataset.from_list([{"text": "a"}, {"text": "b"}])).num_rows
        2
    """
    if isinstance(source, Dataset | DatasetDict):
        return _not_empty(_pick(source, split, "the DatasetDict"), "the Dataset")
    name = fspath(source)
    path = Path(name).expanduser()
    if path.is_file() or _suffix(path):
        return _not_empty(_load_file(path), name)
    base, _, wanted = name.partition(":")
    directory = Path(base).expanduser()
    if directory.is_dir():
        return _not_empty(_pick(_load_directory(directory), split, base, wanted), name)
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such file or directory")
    return _not_empty(_pick(_load_from_hub(base, wanted), split, base), name)


def describe(source: Any) -> str:  # noqa: ANN401 - any source
    """How errors and reports name a source."""
    return "the Dataset given" if isinstance(source, Dataset | DatasetDict) else fspath(source)


def rename_columns(rows: Dataset, names: dict[str, str], source: str = "the Dataset") -> Dataset:
    """Give columns other names; a column that has the new name already makes way.

    Args:
        rows: Any.
        names: From what the data has to what it should have.
        source: Named in errors.

    Returns:
        The rows.

    Raises:
        ValueError: If there is no such column.
    """
    missing = [name for name in names if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{source} has no column {missing[0]!r} to rename; it has {', '.join(rows.column_names)}"
        )
    taken = [name for name in names.values() if name in rows.column_names and name not in names]
    return rows.remove_columns(taken).rename_columns(names) if names else rows


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in BUILDERS if path.name.endswith(suffix)), None)


def _load_file(path: Path) -> Dataset:
    suffix = _suffix(path)
    if suffix is None:
        raise ValueError(f"{path}: unknown kind of file; known are {', '.join(BUILDERS)}")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if _suffix(p))[:5] if path.parent.is_dir() else []
        hint = f"; its directory has {', '.join(near)}" if near else ""
        raise FileNotFoundError(f"{path}: no such file{hint}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; it must hold at least one row")
    try:
        return load_dataset(BUILDERS[suffix], data_files=str(path), split="train")
    except Exception as error:
        # What datasets says names neither file nor row: look for the cause, and if there is none to be found
        # hand on what it said.
        if BUILDERS[suffix] == "json":
            _explain_json(path, error)
        if suffix == ".csv" and sum(bool(line.strip()) for _, line in _lines(path)) < 2:
            raise ValueError(f"{path} is empty; it must hold at least one row below its header") from error
        raise ValueError(f"{path} cannot be read: {_root(error)}") from error


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _explain_json(path: Path, error: Exception) -> None:
    """Raise what is wrong with a file of JSON lines, if it can be found."""
    types: dict[str, str] = {}
    rows = 0
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            if path.name.endswith(".json"):
                _explain_document(path)
                return
            raise ValueError(
                f"{path}, row {number}: invalid JSON ({problem.msg} at character {problem.pos + 1}): "
                f"{line[:60].strip()!r}. Correct or delete this line"
            ) from error
        if not isinstance(row, dict):
            if path.name.endswith(".json"):
                return
            raise ValueError(
                f"{path}, row {number}: a {type(row).__name__}, not an object of columns"
            ) from error
        rows += 1
        for column, value in row.items():
            kind = _kind(value)
            if kind and types.setdefault(column, kind) != kind:
                raise ValueError(
                    f"{path}, row {number}: column {column!r} is {kind} here and {types[column]} before; "
                    "give it one type in all rows"
                ) from error
    if not rows:
        raise ValueError(f"{path} is empty; it must hold at least one row") from error


def _explain_document(path: Path) -> None:
    try:
        json.loads(path.read_text())
    except json.JSONDecodeError as problem:
        raise ValueError(
            f"{path}, line {problem.lineno}: invalid JSON ({problem.msg} at column {problem.colno})"
        ) from problem


def _kind(value: Any) -> str | None:  # noqa: ANN401 - any JSON value
    if value is None:
        return None
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "an object"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    file: IO[str]
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: the gzip stream is cut off or damaged after row {number} ({error}). Fetch or compress it again"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, row {number + 1}: not UTF-8 ({error.reason}). Convert the file") from error


def _load_directory(directory: Path) -> Dataset | DatasetDict:
    saved = (directory / "dataset_info.json").exists() or (directory / "dataset_dict.json").exists()
    try:
        return load_from_disk(str(directory)) if saved else load_dataset(str(directory))
    except Exception as error:
        raise ValueError(
            f"{directory}: neither saved by datasets' save_to_disk nor a directory of data files: {_root(error)}"
        ) from error


def _load_from_hub(name: str, split: str) -> Dataset | DatasetDict:
    try:
        return load_dataset(name, split=split or None)
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}. Load it with the datasets library and give the Dataset"
        ) from error
    except Exception as error:
        raise FileNotFoundError(
            f"{name}: no such file or directory, and as a data set of the Hub it could not be loaded: "
            f"{_root(error)}. Without network, give a file or a directory, or a data set that is already in the cache"
        ) from error


def _pick(rows: Dataset | DatasetDict, split: str, name: str, wanted: str = "") -> Dataset:
    if isinstance(rows, Dataset):
        return rows
    candidates = (wanted,) if wanted else SPLIT_NAMES.get(split, (split,))
    for candidate in candidates:
        if candidate in rows:
            return rows[candidate]
    if len(rows) == 1 and not wanted:
        return next(iter(rows.values()))
    raise ValueError(
        f"{name} has the splits {', '.join(rows)}, none of them {' or '.join(candidates)}; "
        f"name one: {name}:{next(iter(rows))}"
    )


def _not_empty(rows: Dataset, name: str) -> Dataset:
    if not len(rows):
        raise ValueError(f"{name} is empty; it must hold at least one row")
    return rows
