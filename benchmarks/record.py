"""What every result file says of itself, and how such files are written and read.

A file is a dataclass as JSON; `benchmarks.schema` reads it strictly. It derives from `Origin`, or from
`Measured` where a clock or a counter was read: then the device belongs to it.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from benchmarks.schema import decode

__all__ = ["Device", "Measured", "Origin", "read_record", "write_record"]

T = TypeVar("T")


@dataclass(frozen=True)
class Device:
    """Where something ran."""

    kind: Literal["cpu", "cuda"] = field(metadata={"help": "type of device"})
    name: str = field(metadata={"help": "model name"})
    count: int = field(metadata={"help": "devices of this kind: usable cores, or visible GPUs"})
    memory_bytes: int = field(metadata={"help": "memory of the machine, or of one GPU"})


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which code made a file, when and how."""

    versions: dict[str, str | None] = field(
        metadata={"help": "python, torch, triton, cuda, driver; null where absent"}
    )
    commit: str | None = field(metadata={"help": "git commit of the code; null outside a clone"})
    dirty: bool | None = field(
        metadata={"help": "whether tracked files differed from that commit; null outside a clone"}
    )
    date: str = field(metadata={"help": "start, ISO 8601, UTC"})
    command: str = field(metadata={"help": "how to repeat the run"})


@dataclass(frozen=True, kw_only=True)
class Measured(Origin):
    """And on what."""

    device: Device = field(metadata={"help": "where it ran"})


def write_record(record: Any, path: Path) -> None:
    """Write a dataclass whole: whoever reads meanwhile finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    text = json.dumps(asdict(record), indent=1, allow_nan=False, ensure_ascii=False)
    part.write_text(text + "\n", "utf-8")
    part.replace(path)


def read_record(kind: type[T], path: Path, version: int) -> T:
    """Read and check what `write_record` wrote.

    Args:
        kind: the dataclass, with a field `schema_version`.
        version: the one that this reader knows.

    Raises:
        ValueError: not a file of this format; names the file and the first fault.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        found = data.get("schema_version") if isinstance(data, dict) else None
        if found != version:
            raise ValueError(f"$.schema_version = {found!r}: this reader knows {version}")
        record: T = decode(kind, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return record
