"""Who saves: dtrain's checkpoints, and torch.distributed.checkpoint as it comes.

                  plain                                 dtrain
    tensor files  written, synced                       written, synced, hashed (SHA-256)
    description   a pickle, synced, renamed             JSON with progress, config, hashes; synced
    folder        as it is                              synced, renamed, its parent synced
    load          reads                                 reads and hashes every file first, then reads

`async_save` syncs files by default (`FileSystemWriter(sync_files=True)`). It makes new buffers for every copy
of the state, ours keeps its own from save to save. Plain gets a process group of its own, as ours has: in the
default one its thread's collectives would meet those of the training.
"""

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.saving.job import OURS, PLAIN
from dtrain.checkpoint import CheckpointConfig, Checkpointer, Progress, TrainingState, choose_checkpoint

__all__ = ["Contestant", "Ours", "Plain", "clear", "contestants", "disk_bytes"]


class Contestant(Protocol):
    """Saves one state, one save at a time; all ranks call the same."""

    folder: Path
    """Below which it writes."""

    def begin(self) -> None:
        """What a training step waits for."""

    def done(self) -> bool:
        """Whether this rank's part is written."""

    def finish(self) -> None:
        """Wait until all is written; raises what went wrong."""

    def load(self) -> None:
        """Fill the state with what was saved last."""


class Plain:
    """torch.distributed.checkpoint."""

    def __init__(self, folder: Path, state: TrainingState) -> None:
        self.folder, self.state = folder, state
        self._group = dist.new_group(backend="gloo")
        self._writing: Future[Any] | None = None

    def begin(self) -> None:
        writing = async_save(self.state.tensors(), checkpoint_id=self.folder, process_group=self._group)
        assert isinstance(writing, Future)
        self._writing = writing

    def done(self) -> bool:
        return self._writing is not None and self._writing.done()

    def finish(self) -> None:
        assert self._writing is not None
        self._writing.result()

    def load(self) -> None:
        load(self.state.tensors(), checkpoint_id=self.folder)


class Ours:
    """dtrain's checkpoints."""

    def __init__(self, folder: Path, state: TrainingState) -> None:
        self.folder, self.state = folder, state
        # Old ones are removed between rounds, of both contestants alike: none is to be deleted in a save.
        config = CheckpointConfig(keep=10**6)
        self._saver = Checkpointer(folder, config, dist.new_group(backend="gloo"), dist.get_rank() == 0)
        self._saves = 0

    def begin(self) -> None:
        self._saves += 1
        self._saver.save(self.state, Progress(self._saves, 0, 0, dist.get_world_size(), ""))

    def done(self) -> bool:
        return self._saver.written

    def finish(self) -> None:
        if not self._saver.wait():
            raise RuntimeError(f"{self.folder}: save {self._saves} failed, see the warning above")

    def load(self) -> None:
        found = choose_checkpoint(CheckpointConfig(), self.folder)
        assert found is not None
        self.state.load(found)


def contestants(folder: Path, state: TrainingState) -> dict[str, Contestant]:
    """Both, by name; all ranks make them in this order."""
    return {PLAIN: Plain(folder / "plain", state), OURS: Ours(folder / "dtrain", state)}


def disk_bytes(folder: Path) -> int:
    """Of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def clear(folder: Path) -> None:
    """Remove what was saved, all ranks together."""
    dist.barrier()
    if dist.get_rank() == 0 and folder.exists():
        shutil.rmtree(folder)
    dist.barrier()
