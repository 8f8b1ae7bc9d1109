"""`python -m dtrain verify`: which checkpoints of a run are as they were written."""

from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

from dtrain.checkpoint.folder import SUMS, Damaged, damage, read_progress, step_folders

__all__ = ["verify"]


def verify(folder: Path) -> tuple[list[tuple[str, str]], bool]:
    """Hash every file of every checkpoint.

    Args:
        folder: of a run, of its checkpoints, or of one.
    Returns: rows (checkpoint, verdict) for a table, and whether all are intact.
    Raises:
        FileNotFoundError: no checkpoint is there.
    """
    rows, intact = [], True
    for checkpoint in track(_checkpoints(folder), "checkpoints", transient=True):
        faults = list(damage(checkpoint))
        intact &= not faults
        rows.append((checkpoint.name, "DAMAGED" if faults else f"intact, {_said(checkpoint)}"))
        rows += [("", fault) for fault in faults]
    for name in _unfinished(folder):
        rows.append((name, "never finished; not used"))
    return rows, intact


def _checkpoints(folder: Path) -> list[Path]:
    if (folder / SUMS).exists() or folder.name.startswith("step-"):
        return [folder]
    found = step_folders(folder) or step_folders(folder / "checkpoints")
    if not found:
        raise FileNotFoundError(f"{folder}: no checkpoint is here, nor in {folder / 'checkpoints'}.")
    return found


def _unfinished(folder: Path) -> Iterator[str]:
    for place in (folder, folder / "checkpoints"):
        yield from sorted(path.name for path in place.glob("partial-*"))


def _said(checkpoint: Path) -> str:
    nbytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    try:
        progress = read_progress(checkpoint)
    except Damaged as error:  # intact, and yet written by something else
        return str(error)
    return (
        f"{nbytes / 2**20:,.1f} MiB, step {progress.step:,}, {progress.sample:,} samples, written by "
        f"{progress.world} rank(s)"
    )
