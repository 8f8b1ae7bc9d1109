"""Which checkpoint a run continues from: the newest that is intact. One that is not is named, never used."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.folder import Damaged, damage, step_folders

__all__ = ["check_resume", "choose_checkpoint"]

log = logging.getLogger(__name__)


def check_resume(config: CheckpointConfig, folder: Path) -> None:
    """See that `config.resume` is possible, before anything starts.

    Args:
        config: of the run.
        folder: where its checkpoints lie.

    Raises:
        ValueError: it forbids or names something that the disk contradicts.
    """
    if config.resume == "never" and (found := step_folders(folder)):
        raise ValueError(
            f'checkpoint.resume = "never", but {folder} already holds {found[-1].name}: '
            "choose another name for the run, or move that folder away."
        )
    if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
        raise ValueError(f"checkpoint.resume = {config.resume!r}: no checkpoint is there.")


def choose_checkpoint(config: CheckpointConfig, folder: Path) -> Path | None:
    """The checkpoint to load, or None for a fresh start. All ranks call it and share the reading.

    Raises:
        Damaged: that which `config.resume` names is; or all are, and a fresh start would lose the run.
    """
    shared: list[list[Path]] = [_candidates(config, folder) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(shared)
    faults: list[str] = []
    for checkpoint in shared[0]:
        wrong = _damage(checkpoint)
        if not wrong:
            return checkpoint
        faults += wrong
        if dist.get_rank() == 0:
            log.warning("checkpoint: %s is damaged and not used: %s", checkpoint.name, "; ".join(wrong))
    if faults:
        raise Damaged(f"no intact checkpoint is in {folder}: {'; '.join(faults)}")
    return None


def _candidates(config: CheckpointConfig, folder: Path) -> list[Path]:
    """Best first."""
    if config.resume == "never":
        return []
    return step_folders(folder)[::-1] if config.resume == "auto" else [Path(config.resume)]


def _damage(checkpoint: Path) -> Sequence[str]:
    """Its faults, as all ranks see them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone: list[list[str]] = [[]] * world
    dist.all_gather_object(everyone, list(damage(checkpoint, rank, world)))
    return list(dict.fromkeys(fault for faults in everyone for fault in faults))
