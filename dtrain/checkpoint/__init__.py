"""Checkpoints: the whole state of a run on disk, written while training goes on, trusted only if intact.

Every rank writes its own shards, and any other mesh may read them.
"""

from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.folder import (
    Damaged,
    Progress,
    damage,
    find_checkpoint,
    read_manifest,
    read_progress,
    step_folders,
)
from dtrain.checkpoint.resume import check_resume, choose_checkpoint
from dtrain.checkpoint.saver import Checkpointer, SaveFailed
from dtrain.checkpoint.state import TrainingState

__all__ = [
    "CheckpointConfig", "Checkpointer", "Damaged", "Progress", "SaveFailed", "TrainingState",
    "check_resume", "choose_checkpoint", "damage", "find_checkpoint", "read_manifest", "read_progress",
    "step_folders",
]  # fmt: skip
