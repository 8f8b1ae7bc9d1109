"""Reading whole checkpoints, to compare runs bit by bit."""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


def all_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, optimizer state, averages."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in metadata.values())
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors
