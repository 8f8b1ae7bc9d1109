"""The training clips: where they come from, which one global sample index i means, how they form a batch.

An index means the same clip on every rank, in every worker and after every resume:

    (epoch, position) = divmod(i, length),    item = permutation(seed, epoch)[position]

and whatever else is drawn for it (start frame, crop, flip) is keyed by (seed, purpose, i). The permutation is
NumPy's, seeded by dtrain.rng: https://numpy.org/doc/stable/reference/random/generator.html

Shapes: B batch, C colours (3), T frames, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dtrain.data import epoch_of
from dtrain.recipe import Batch, Clip
from dtrain.rng import derive_seed


@dataclass(frozen=True)
class DataConfig:
    """The `[data]` table: which clips, how long, how large."""

    kind: Literal["folder", "shapes"] = field(
        default="folder",
        metadata={"help": "folder = videos under `path`; shapes = generated, no files"},
    )
    path: str = field(default="", metadata={"help": "folder to search for videos and images"})
    frames: int = field(default=16, metadata={"help": "frames of a clip; 1 trains on images"})
    height: int = field(default=64, metadata={"help": "height of a clip, pixels"})
    width: int = field(default=64, metadata={"help": "width of a clip, pixels"})
    fps: float = field(
        default=0.0,
        metadata={"help": "frames per second that a clip is read at; 0 = each file's own rate (shapes: 8)"},
    )
    stride: int = field(default=1, metadata={"help": "take every n-th frame at that rate"})
    clips_per_video: int = field(
        default=0,
        metadata={"help": "0 = a new random start at every visit; n = n fixed, evenly spaced starts a video"},
    )
    limit: int = field(
        default=0, metadata={"help": "use only the first n clips, e.g. to overfit a handful; 0 = all of them"}
    )
    captions: Literal["auto", "files", "metadata", "folders", "none"] = field(
        default="auto",
        metadata={
            "help": "files = name.txt beside name.mp4; metadata = metadata.jsonl; folders = name of the "
            "class folder; auto = metadata.jsonl, else name.txt; none = no captions"
        },
    )
    crop: Literal["center", "random"] = field(
        default="center", metadata={"help": "which part is kept where the file's shape is not the clip's"}
    )
    flip: bool = field(
        default=False, metadata={"help": "mirror half of the clips left to right (captions stay as they are)"}
    )
    workers: int = field(default=2, metadata={"help": "processes per rank that read ahead; 0 = none"})

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: too small; at least {least} is needed")
        if self.kind == "folder" and not self.path:
            raise ValueError("path = '': kind = 'folder' needs the folder of videos; or set kind = 'shapes'")


_LEAST = {
    "frames": 1,
    "height": 1,
    "width": 1,
    "fps": 0,
    "stride": 1,
    "clips_per_video": 0,
    "limit": 0,
    "workers": 0,
}


class ClipDataset(Protocol):
    """What both kinds of data give; picklable, so that worker processes can read it.

    A sample is {"video": (C, T, H, W) fp32 in [-1, 1], "index": int, "caption": str, "class": int,
    "source": str, "skipped": [(source, reason), …]}; "skipped" names the files passed over to fill it.
    """

    classes: tuple[str, ...]
    """Names of the class indices."""
    skipped: tuple[tuple[str, str], ...]
    """(source, reason) of the files that were found unusable before training."""
    fingerprint: str
    """Changes when the clips change: equal on all ranks and over a resume, or the data is not the same."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def clips(self, count: int) -> list[Clip]:
        """The first `count` clips in their unshuffled order (fewer if there are fewer)."""
        ...


def item_of(index: int, length: int, seed: int, ahead: int = 0) -> int:
    """Which of `length` items a global sample index means; `ahead` counts on, in a circle."""
    epoch, position = epoch_of(index, length)
    return int(_permutation(seed, epoch, length)[(position + ahead) % length])


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.Generator(np.random.PCG64(derive_seed(seed, "epoch", epoch))).permutation(length)


def to_video(frames_THW3: Tensor) -> Tensor:
    """Pixels (T, H, W, 3) uint8 -> model input (3, T, H, W) fp32 in [-1, 1]."""
    return frames_THW3.permute(3, 0, 1, 2).contiguous().float() / 127.5 - 1


def to_frames(video_CTHW: Tensor) -> Tensor:
    """Model output (3, T, H, W), nominally in [-1, 1] -> pixels (T, H, W, 3) uint8 on the CPU."""
    pixels = (video_CTHW.detach().float().cpu() + 1) * 127.5
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Stack samples: "video" (B, C, T, H, W) fp32, "index" and "class" (B,) int64, the rest as lists."""
    return {
        "video": torch.stack([s["video"] for s in samples]),
        "index": torch.tensor([s["index"] for s in samples], dtype=torch.int64),
        "class": torch.tensor([s["class"] for s in samples], dtype=torch.int64),
        "caption": [s["caption"] for s in samples],
        "source": [s["source"] for s in samples],
        "skipped": [entry for s in samples for entry in s["skipped"]],
    }
