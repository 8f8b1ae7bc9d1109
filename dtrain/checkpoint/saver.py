"""Saving while training goes on: the step waits for a copy of the state, and a thread writes it.

A save that fails, because the disk is full or the store is gone, costs no more than itself: the run goes on,
says so, and tries again. All ranks know alike how a save went, since PyTorch gathers their errors.
"""

import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.folder import Progress, step_folders, sync_folder, write_manifest
from dtrain.checkpoint.state import TrainingState
from dtrain.checkpoint.storage import Writer
from dtrain.faults.errors import RunFault

__all__ = ["Checkpointer", "SaveFailed"]

log = logging.getLogger(__name__)


class SaveFailed(RunFault):
    """The last checkpoint of a run could not be written."""


class _StepWriter(Writer):
    """Writes below a temporary name, which becomes the checkpoint's when all is on the disk.

    Args:
        folder: of all checkpoints.
        progress: of the run.
        config: of the run, as TOML.
        keep: checkpoints that stay.
    """

    def __init__(self, folder: Path, progress: Progress, config: str, keep: int) -> None:
        super().__init__(folder / f"partial-{progress.step:08d}")
        self.final = folder / f"step-{progress.step:08d}"
        self.progress, self.config, self.keep = progress, config, keep

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a save that was cut short
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        write_manifest(self.folder, self.progress, self.config, self.digests)
        if self.final.exists():  # of an earlier life of the run, which went on from before it
            _delete(self.final)
        self.folder.rename(self.final)
        sync_folder(self.final.parent)
        for old in step_folders(self.final.parent)[: -self.keep]:
            _delete(old)


def _delete(folder: Path) -> None:
    """Remove a checkpoint, under another name: half of one must not be taken for a damaged one."""
    doomed = folder.with_name(f"deleted-{folder.name}")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("checkpoint: %s could not be deleted: %s", folder, error)


class Checkpointer:
    """Saves asynchronously, one save at a time, and keeps the newest few.

    Every rank owns one and calls its methods at the same steps.

    Args:
        folder: where checkpoint folders lie.
        config: how often, and how many are kept.
        group: a process group with a CPU backend of the checkpointer's own, because saving runs its
            collectives on a background thread.
        is_main: this rank speaks.
        run_config: of the run, as TOML, for the manifest.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        group: dist.ProcessGroup,
        is_main: bool,
        run_config: str = "",
    ) -> None:
        self.folder = folder
        self.config = config
        self.group = group
        self.is_main = is_main
        self.run_config = run_config
        self.failed = 0
        """Saves in a row that failed."""
        self.failures = 0
        """Saves that failed, in all."""
        self.newest: Path | None = None
        """Saved by this object."""
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._pending: tuple[Future[Any], Progress] | None = None

    def due(self, step: int) -> bool:
        """Whether the state after this step is to be saved; sooner than usual after a failure."""
        return step % (self.config.retry_every if self.failed else self.config.every) == 0

    @property
    def writing(self) -> bool:
        """Whether a save is in flight."""
        return self._pending is not None

    @property
    def written(self) -> bool:
        """Whether this rank's part of the save in flight is done; others may still write."""
        return self._pending is not None and self._pending[0].done()

    def save(self, state: TrainingState, progress: Progress) -> None:
        """Copy the state to host memory and write it in the background; waits for an unfinished save."""
        self.wait()
        writer = _StepWriter(self.folder, progress, self.run_config, self.config.keep)
        writing = async_save(
            state.tensors(), storage_writer=writer, process_group=self.group, async_stager=self._stager
        )
        assert isinstance(writing, Future)
        self._pending = (writing, progress)

    def wait(self) -> bool:
        """Block until no save is in flight; whether the newest one succeeded."""
        if self._pending is None:
            return not self.failed
        writing, progress = self._pending
        self._pending = None
        try:
            writing.result()
        except CheckpointException as error:
            self._fail(progress, error)
        else:
            if self.failed and self.is_main:
                log.warning("checkpoint: step %d is saved, %d before it failed.", progress.step, self.failed)
            self.failed = 0
            self.newest = self.folder / f"step-{progress.step:08d}"
        return not self.failed

    def close(self) -> None:
        """Wait for the last save.

        Raises:
            SaveFailed: it could not be written.
        """
        saved = self.wait()
        self._stager.close()
        if not saved:
            raise SaveFailed(
                f"{self.folder}: the last checkpoint could not be written, see the warnings above."
            )

    def _fail(self, progress: Progress, error: CheckpointException) -> None:
        self.failed += 1
        self.failures += 1
        if not self.is_main:
            return
        # What is there of it takes room that the next one needs.
        shutil.rmtree(self.folder / f"partial-{progress.step:08d}", ignore_errors=True)
        causes = "; ".join(f"rank {rank}: {cause[0]!r}" for rank, cause in sorted(error.failures.items()))
        log.warning(
            "checkpoint: step %d could not be saved (%d in a row): %s. The run goes on and tries again "
            "within %d steps.",
            progress.step, self.failed, causes, self.config.retry_every,
        )  # fmt: skip
