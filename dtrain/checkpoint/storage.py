"""PyTorch's distributed checkpoint on disk, without pickles, and hashed as it is written.

PyTorch describes a checkpoint in a pickle, `.metadata`, which can run anything when it is read. Here the
same lies in `tensors.json`: of each tensor its dtype, its shape, and the chunks that ranks wrote, with the
file and the place in it. Chunks themselves are read with `weights_only`; there is nothing but tensors.

    {"model.blocks.0.attn.qkv.weight": {"dtype": "float32", "shape": [1536, 512], "chunks": [
        {"offset": [0, 0], "shape": [768, 512], "file": "__0_0.distcp", "start": 0, "bytes": 1574115}, ...

Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

__all__ = ["TENSORS", "Reader", "Writer", "digest_of", "write_durably"]

TENSORS = "tensors.json"
# Nothing else: a name cannot leave the folder.
_CHUNK_FILE = re.compile(r"__\d+_\d+\.distcp")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@dataclass
class _Hashed(_StorageInfo):
    """Where a chunk lies, and the hash of that whole file. Travels from every rank to the first."""

    digest: str = ""


class Writer(FileSystemWriter):
    """Writes one checkpoint folder, every file durably; ranks hash their own.

    Args:
        folder: to write to.
    Attributes:
        digests: of all files, by name; on the coordinating rank, once all is written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self.folder = folder
        self.digests: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).value()
        digests: dict[str, str] = {}
        for result in results:
            name = result.storage_data.relative_path
            if name not in digests:
                digests[name] = digest_of(self.folder / name)
        hashed: Future[list[WriteResult]] = Future()
        hashed.set_result([replace(r, storage_data=_with_digest(r.storage_data, digests)) for r in results])
        return hashed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Describe what all ranks have written."""
        places = {r.index: r.storage_data for of_rank in results for r in of_rank}
        text = json.dumps(_described(metadata, places), indent=1)
        write_durably(self.folder / TENSORS, text + "\n")
        self.digests = {place.relative_path: place.digest for place in places.values()}
        self.digests[TENSORS] = digest_of(self.folder / TENSORS)


def _with_digest(place: _StorageInfo, digests: Mapping[str, str]) -> _Hashed:
    return _Hashed(place.relative_path, place.offset, place.length, digest=digests[place.relative_path])


def _described(metadata: Metadata, places: Mapping[MetadataIndex, _StorageInfo]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise TypeError(f"{name} is no tensor: a checkpoint holds nothing else")
        chunks = []
        for chunk in entry.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            chunks.append(
                {
                    "offset": list(chunk.offsets),
                    "shape": list(chunk.sizes),
                    "file": place.relative_path,
                    "start": place.offset,
                    "bytes": place.length,
                }
            )
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}
    return tensors


class Reader(FileSystemReader):
    """Reads what `Writer` wrote.

    Args:
        folder: a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What is in the checkpoint, for PyTorch; see `tensors`."""
        tensors, places = self._read()
        return Metadata(dict(tensors), storage_data=places)

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """What is in the checkpoint: dtype, shape and chunks of every tensor.

        Raises:
            ValueError: `tensors.json` does not describe one; says where.
        """
        return self._read()[0]

    def _read(self) -> tuple[dict[str, TensorStorageMetadata], dict[MetadataIndex, _StorageInfo]]:
        path = self.folder / TENSORS
        found: dict[str, TensorStorageMetadata] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        try:
            for name, entry in json.loads(path.read_text("utf-8")).items():
                found[name] = _tensor(entry)
                for chunk in entry["chunks"]:
                    places[MetadataIndex(name, chunk["offset"])] = _place(chunk)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: describes no checkpoint: {error!r}") from error
        return found, places


def _tensor(entry: Mapping[str, Any]) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(_size(c["offset"]), _size(c["shape"])) for c in entry["chunks"]]
    return TensorStorageMetadata(TensorProperties(_DTYPES[entry["dtype"]]), _size(entry["shape"]), chunks)


def _place(chunk: Mapping[str, Any]) -> _StorageInfo:
    if not _CHUNK_FILE.fullmatch(chunk["file"]):
        raise ValueError(f"file {chunk['file']!r} is no file of a checkpoint")
    start, nbytes = _size([chunk["start"], chunk["bytes"]])
    return _StorageInfo(chunk["file"], start, nbytes)


def _size(numbers: Any) -> torch.Size:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers} are no sizes")
    return torch.Size(numbers)
