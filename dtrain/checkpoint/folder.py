"""A checkpoint's folder: what is in it, what it says of itself, and whether all of it is as it was written.

    step-00001000/
      __0_0.distcp, __1_0.distcp, …   chunks of tensors, a file a rank
      tensors.json                    which chunk is where, see `storage`
      manifest.json                   progress, config, versions
      SHA256SUMS                      of all of these; `sha256sum --check SHA256SUMS` reads it too

A folder gets its name when all of it is on the disk, so that `partial-…` is one that was never finished. What
changed afterwards, a byte or a file, `damage` finds.
"""

import dataclasses
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dtrain
from dtrain.checkpoint.storage import TENSORS, Reader, digest_of, write_durably

__all__ = [
    "Damaged", "Progress",
    "damage", "find_checkpoint", "read_manifest", "read_progress", "step_folders", "write_manifest",
]  # fmt: skip

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_SUM = re.compile(r"([0-9a-f]{64})  (tensors\.json|manifest\.json|__\d+_\d+\.distcp)\n")


class Damaged(ValueError):
    """A checkpoint is not as it was written; says which and how."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands. All random streams follow from `seed` and these counts."""

    step: int
    """Optimizer steps taken."""
    sample: int
    """Samples trained on: place in the stream of the next one."""
    seed: int
    world: int
    """World size that wrote the checkpoint, for information."""
    fingerprint: str
    """Of the data, empty when the recipe has none."""
    left_out: tuple[tuple[int, int], ...] = ()
    """Indices that the run passes over, see `dtrain.recipe.DataState`."""
    losses: tuple[float, ...] = ()
    """Of the newest steps, where a jump of the loss is looked for."""


def step_folders(folder: Path) -> list[Path]:
    """All finished checkpoints below `folder`, oldest first; whether they are intact, `damage` tells."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The newest intact checkpoint below `folder`, or that of `step`.

    Raises:
        FileNotFoundError: there is none; the message lists those that there are.
        Damaged: that of `step`, or all of them.
    """
    found = step_folders(folder)
    have = ", ".join(path.name for path in found) or "none"
    if step is not None:
        found = [path for path in found if int(path.name.removeprefix("step-")) == step]
    if not found:
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise FileNotFoundError(f"{folder}: {wanted} is here (found: {have}).")
    faults: list[str] = []
    for path in reversed(found):
        if not (wrong := list(damage(path))):
            return path
        faults += wrong
    raise Damaged("; ".join(faults))


def write_manifest(folder: Path, progress: Progress, config: str, digests: Mapping[str, str]) -> None:
    """Complete a folder whose tensors are written, durably.

    Args:
        folder: of the checkpoint.
        progress: of the run.
        config: of the run, as TOML.
        digests: SHA-256 of every file that is there, by name.
    """
    manifest = {
        "format": _FORMAT,
        "progress": dataclasses.asdict(progress),
        "versions": {
            "dtrain": dtrain.__version__, "torch": torch.__version__, "python": platform.python_version(),
        },
        "config": config,
    }  # fmt: skip
    write_durably(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    digests = {**digests, MANIFEST: digest_of(folder / MANIFEST)}
    write_durably(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        Damaged: it cannot be read, or is of another format.
    """
    path = checkpoint / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: no manifest: {error!r}") from error
    if found != _FORMAT:
        raise Damaged(f"{path}: format {found!r}, this version of dtrain reads {_FORMAT}")
    return manifest


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood; Damaged if the manifest does not say."""
    try:
        found = read_manifest(checkpoint)["progress"]
        left_out = tuple((start, stop) for start, stop in found.pop("left_out"))
        return Progress(**found | {"left_out": left_out, "losses": tuple(found["losses"])})
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{checkpoint / MANIFEST}: no progress: {error!r}") from error


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> Iterator[str]:
    """Everything in a folder that is not as it was written, one line a fault.

    Args:
        checkpoint: the folder.
        part, parts: ranks share the work of hashing; each sees the faults of its own files.
    """
    try:
        sums = _read_sums(checkpoint / SUMS)
    except Damaged as error:
        yield str(error)
        return
    for name in sorted(sums)[part::parts]:
        path = checkpoint / name
        try:
            digest = digest_of(path)
        except OSError as error:
            yield f"{path}: cannot be read: {error.strerror}"
            continue
        if digest != sums[name]:
            size = path.stat().st_size
            yield f"{path}: SHA-256 of its {size:,} bytes is {digest[:12]}…, written was {sums[name][:12]}…"
    if part == 0:
        yield from _unlisted(checkpoint, sums)


def _unlisted(checkpoint: Path, sums: Iterable[str]) -> Iterator[str]:
    """Files that belong to the checkpoint and have no hash."""
    needed = {MANIFEST, TENSORS}
    if TENSORS in sums:
        try:
            places = Reader(checkpoint).read_metadata().storage_data
            needed |= {place.relative_path for place in places.values()}
        except (OSError, ValueError):
            return  # its hash is wrong too, which is said
    for name in sorted(needed - set(sums)):
        yield f"{checkpoint / SUMS}: has no line for {name}"


def _read_sums(path: Path) -> dict[str, str]:
    try:
        text = path.read_bytes().decode("ascii")
    except OSError as error:
        raise Damaged(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Damaged(f"{path}: no list of hashes") from error
    lines = text.splitlines(keepends=True)
    found = [_SUM.fullmatch(line) for line in lines]
    if not found or None in found:
        number = found.index(None) + 1 if None in found else 1
        raise Damaged(f"{path}: line {number} is no hash and name")
    sums = {match[2]: match[1] for match in found if match}
    if len(sums) != len(lines):
        raise Damaged(f"{path}: a file is listed twice")
    return sums
