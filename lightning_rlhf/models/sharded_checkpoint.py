"""A checkpoint of many files, read by one process: ``save_distributed_checkpoint`` of FSDP2, and DeepSpeed's."""

import pickle
import warnings
from enum import Enum, EnumMeta
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, Metadata

INDEX, SETTINGS = ".metadata", "meta.pt"
"""PyTorch's index of a sharded checkpoint, and what Lightning writes beside it when all else is written."""
PREFIX = "state_dict."
DEEPSPEED, DEEPSPEED_DONE = "checkpoint/mp_rank_00_model_states.pt", "latest"
"""What DeepSpeed's stages 1 and 2 write but for the optimizer, and the file that is written last."""
# What an index is made of, in PyTorch 2.13: descriptions, sizes and places, and nothing that does anything.
_DESCRIPTIONS = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_DESCRIPTIONS, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}
_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError),
    *(pickle.UnpicklingError, dcp.CheckpointException),
)


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint of many files, written to its end."""
    return (path / INDEX).is_file() and (path / SETTINGS).is_file()


def is_deepspeed_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint of DeepSpeed with whole weights, written to its end."""
    return (path / DEEPSPEED).is_file() and (path / DEEPSPEED_DONE).is_file()


def read_sharded(path: Path, *, weights: bool = True) -> dict[str, Any]:
    """What one file would hold, but for the optimizer; nothing in it is executed.

    Args:
        path: The directory.
        weights: Read them; else the names in ``state_dict`` have no values.

    Raises:
        ValueError: If the files are not those that this package's modules write under FSDP2.
    """
    try:
        content: Any = torch.load(path / SETTINGS, map_location="cpu", weights_only=True)
        names = {name for name, shape in content["shapes"].items() if shape is not None}
        state = _read(path, names) if weights else dict.fromkeys(content["shapes"])
        return {**content, "state_dict": {**state, **content["beside_parameters"]}}
    except _UNREADABLE as error:
        raise ValueError(f"{path} is not a readable sharded checkpoint: {str(error)[:200]}") from error


def _read(path: Path, names: set[str]) -> dict[str, Tensor]:
    reader = _Reader(path)
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.TensorStorageMetadata) and key.removeprefix(PREFIX) in names
    }
    if missing := names - {key.removeprefix(PREFIX) for key in found}:
        raise ValueError(f"its index lacks {len(missing)} of {len(names)} parameters, such as {min(missing)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what is asked for
        dcp.load(found, storage_reader=reader, no_dist=True)
    return {key.removeprefix(PREFIX): tensor for key, tensor in found.items()}


class _Reader(FileSystemReader):
    """PyTorch's reader, which would run whatever an index asks for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401 - as in PyTorch
        """Descriptions and places of what was saved."""
        with (Path(self.path) / INDEX).open("rb") as file:
            found: Metadata = _Unpickler(file).load()
        return found


def _member(kind: Any, name: str) -> Enum:  # noqa: ANN401 - as in pickle
    """A member of an enumeration, which the first releases of Python 3.11 look up as an attribute."""
    if not isinstance(kind, EnumMeta):
        raise pickle.UnpicklingError(f"its index asks for {name!r} of {kind!r}, which no index needs")
    found: Enum = kind[name]
    return found


class _Unpickler(pickle.Unpickler):
    """Of an index: makes descriptions, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - as in pickle
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        is_path = module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath")
        if is_path:
            return PurePath
        if (module, name) == ("builtins", "getattr"):
            return _member
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index asks for {module}.{name}, which no index needs")
