"""Recipe: the bundle of callables through which a model enters the trainer.

There is no base class and no registry. A recipe is named in a run's config by an import path,
`recipe = "package.module:factory"`; the factory's one parameter is annotated with a dataclass whose fields
are the config tables that the recipe adds (`[model]`, `[data]`, …), and it returns a `Recipe`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.rng import SampleRNG

# A micro-batch. "index" (B,) int64 holds the global sample indices; "skipped" may list (source, reason) of
# inputs that were passed over to fill it; every other entry is the recipe's own. Tensors are moved to the
# device by the trainer.
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class DataState:
    """Where in the endless stream of global sample indices a run stands.

    The stream is cut into micro-steps of `world * micro_batch` samples; rank r reads the r-th run of
    `micro_batch` of each. The position alone decides what is read, so a run may resume on another world.
    Place n of the stream is index n, unless indices are left out.
    """

    seed: int
    sample: int
    """Samples trained on: place in the stream of the next one."""
    micro_batch: int
    """Samples per rank and micro-step."""
    device: str = "cpu"
    """Where the batches will be moved to: pinned memory is worth it for CUDA."""
    left_out: tuple[tuple[int, int], ...] = ()
    """Ranges [start, stop) of indices that the stream passes over, apart and by rising start."""


@dataclass(frozen=True)
class SampleRequest:
    """What the trainer or the command line asks a recipe to generate.

    `first` and `count` select items of an endless, deterministic list of samples (item i has its own noise
    and condition), so that ranks can share the work and a later request shows the same items again.
    """

    first: int
    count: int
    seed: int
    options: Mapping[str, Any]
    """Overrides of the recipe's sampling settings, by field name (`steps`, `guidance`, …)."""
    progress: Callable[[int, int], object] | None = None
    """Called with (solver steps done, in all) where somebody watches."""
    device: torch.device | None = None
    """Where to compute; None: where the parameters are, which `shard.cpu_offload` keeps on the host."""


@dataclass(frozen=True)
class Clip:
    """One generated or real clip: pixels (T, H, W, 3) uint8, its caption, its frame rate."""

    frames: Tensor
    caption: str
    fps: float


@dataclass(frozen=True)
class Recipe:
    """What a model brings. See the field comments; docs/design.md shows a 30-line example."""

    build: Callable[[], nn.Module]
    """The model; called under torch.device("meta")."""
    init: Callable[[nn.Module], None]
    """Fills parameters and buffers after to_empty(); must not depend on the world size."""
    loss: Callable[[nn.Module, Batch, SampleRNG], Tensor]
    """Scalar mean over the local micro-batch."""
    data: Callable[[int, int, DataState], Iterable[Batch]]
    """(rank, world, state) -> endless iterable of micro-batches."""
    flops: Callable[[Batch], int]
    """Forward FLOPs of one micro-batch."""
    tokens: Callable[[Batch], int] | None = None
    """Tokens of one micro-batch, for throughput."""
    blocks: Callable[[nn.Module], Sequence[nn.Module]] | None = None
    """The repeated blocks in forward order; found by structure when absent."""
    sample: Callable[[nn.Module, SampleRequest], list[Clip]] | None = None
    """Generates clips, on every rank at once: how often it calls the model depends on `count` only."""
    save_clips: Callable[[Sequence[Clip], Path], list[Path]] | None = None
    """Writes clips into a folder as files that people can open; called on rank 0."""
    score: Callable[[Sequence[Clip], int, Path], Mapping[str, float]] | None = None
    """(clips, the run's seed, folder) -> figures of merit, units in their names (`psnr_db`); may write a
    picture of the comparison into the folder; called on rank 0."""
    fingerprint: Callable[[int], str] | None = None
    """(the run's seed) -> what identifies the data: ranks must agree, a resumed run says if it changed."""
