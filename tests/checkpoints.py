"""Writing and reading whole checkpoints, to compare runs bit by bit."""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dtrain.checkpoint import TrainingState
from dtrain.checkpoint.storage import Reader, Writer


def write_state(state: TrainingState, folder: Path) -> None:
    """All of a state, now; all ranks call it."""
    save(state.tensors(), storage_writer=Writer(folder))


def all_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, optimizer state, averages."""
    reader = Reader(checkpoint)
    metadata = reader.tensors()
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors
