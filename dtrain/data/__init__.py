"""A run's data: one endless stream of samples, read ahead by workers that may die."""

from dtrain.data.loading import IndexedDataset, RestartingLoader, SampleFault, loader
from dtrain.data.stream import epoch_of, index_at, leave_out, micro_batch_indices

__all__ = [
    "IndexedDataset", "RestartingLoader", "SampleFault",
    "epoch_of", "index_at", "leave_out", "loader", "micro_batch_indices",
]  # fmt: skip
