"""Clips in memory: the training set and the held-out one, drawn once and kept as bytes in one file.

Sample i of a training is item `item_of(i, …, seed)` of the set, in epochs that the seed shuffles. So every
variant sees the same clips in the same order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy.settings import Settings
from dtrain.data import micro_batch_indices
from dtrain.recipe import Batch, DataState
from uvit.clips import item_of
from uvit.shapes import CLASSES, Shapes

__all__ = ["Clips", "draw", "load", "training_batches"]

_TRAINING, _HELD_OUT = 1, 2  # seeds of what is drawn


@dataclass(frozen=True)
class Clips:
    """Clips in a tensor.

    Args:
        video: (N, 3, T, H, W) uint8.
        label: (N,) int64, classes.
    """

    video: Tensor
    label: Tensor

    def batch(self, items: Sequence[int], index: Sequence[int]) -> Batch:
        """These items as the samples `index`: "video" fp32 in [-1, 1], "class" and "index"."""
        return {
            "video": self.video[items].float() / 127.5 - 1,
            "class": self.label[items],
            "caption": [CLASSES[label] for label in self.label[items].tolist()],
            "index": torch.tensor(index),
        }


def _drawn(settings: Settings, count: int, seed: int) -> Clips:
    clips = Shapes(settings.data, seed).clips(count)
    video = torch.stack([clip.frames for clip in clips]).permute(0, 4, 1, 2, 3).contiguous()
    return Clips(video, torch.tensor([CLASSES.index(clip.caption) for clip in clips]))


def draw(settings: Settings, path: Path) -> None:
    """Draw the training set and the held-out set to a file."""
    sets = [_drawn(settings, settings.clips, _TRAINING), _drawn(settings, settings.held_out, _HELD_OUT)]
    torch.save([(clips.video, clips.label) for clips in sets], path)


def load(path: Path) -> tuple[Clips, Clips]:
    """The training set and the held-out set that `draw` wrote."""
    training, held_out = torch.load(path)
    return Clips(*training), Clips(*held_out)


def training_batches(clips: Clips, settings: Settings, seed: int, rank: int) -> Iterator[Batch]:
    """A rank's micro-batches, one a step, for ever."""
    state = DataState(seed, 0, settings.batch // settings.ranks)
    for index in micro_batch_indices(rank, settings.ranks, state):
        yield clips.batch([item_of(i, len(clips.label), seed) for i in index], index)
