"""metrics.jsonl on the disk: one JSON object a line, with its `time` (Unix, seconds); a full disk costs none.

What the disk refuses is kept in memory and written as soon as it can be. Values that are not finite are the
strings "nan" and "inf", since JSON has no such numbers; float() reads them back.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["Record", "RecordFile", "disk_faults_said", "drop_after", "read_records", "to_json"]

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class RecordFile:
    """Appends to a metrics.jsonl.

    Args:
        path: of the file; OSError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []
        self._refused = False

    def write(self, record: Record) -> None:
        """Append a line, after those that the disk has refused."""
        stamped = {**record, "time": round(time.time(), 3)}
        self._waiting.append(to_json(stamped).encode() + b"\n")
        self._flush()

    def close(self) -> None:
        """Says what is lost, if the disk refuses to the end."""
        if self._waiting:
            self._flush()
        if self._waiting:
            logger.error("%s: %d lines are lost", self._path, len(self._waiting))
        self._file.close()

    def _flush(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        left = memoryview(b"".join(self._waiting))
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)  # half a line
            if not self._refused:
                logger.warning(
                    "%s: %s; its lines are kept in memory until they can be written", self._path, error
                )
            self._refused = True
            return
        if self._refused:
            logger.warning("%s: %d lines are written late", self._path, len(self._waiting))
        self._refused = False
        self._waiting.clear()


@contextmanager
def disk_faults_said(what: str) -> Iterator[None]:
    """For a file that a run can do without: an OSError inside is said, and ends nothing."""
    try:
        yield
    except OSError as error:
        logger.error("%s could not be written: %s; the run goes on", what, error)


def read_records(path: Path) -> list[Record]:
    """Read metrics.jsonl: its records in order, without notes and without a line that a crash cut short."""
    return [line for line in _lines(path) if "step" in line]


def drop_after(path: Path, step: int) -> int:
    """Remove the records of steps after `step` from a metrics.jsonl, if there is one; return their number."""
    if not path.exists():
        return 0
    lines = _lines(path)
    kept = [line for line in lines if line.get("step", 0) <= step]
    if step == 0:
        kept = []
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(replacement, path)
    return sum("step" in line for line in lines) - sum("step" in line for line in kept)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text in which numbers that are not finite are strings."""
    return json.dumps(_finite(value), indent=indent)


def _lines(path: Path) -> list[Record]:
    whole = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            whole.append(json.loads(text))
        except json.JSONDecodeError:
            logger.warning("%s: an incomplete line was dropped", path)
    return whole


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
