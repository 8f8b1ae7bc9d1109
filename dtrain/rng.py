"""Random numbers that belong to a sample, not to a rank.

Every draw is keyed by (seed, purpose, global sample index). A run that resumes, also on another number of
ranks, therefore sees exactly the noise, the timesteps and the dropped conditions that it would have seen.
Draws are made on the CPU: a CUDA generator's numbers depend on the size of the GPU, and a run must be able
to move.

Key mixing is NumPy's SeedSequence: https://numpy.org/doc/stable/reference/random/bit_generators/
"""

import random
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *keys: int | str) -> int:
    """Mix a base seed with keys into an independent 63-bit seed.

    Args:
        seed: the run's seed, >= 0.
        keys: what the stream is for: names and non-negative integers, in order.
    """
    words = [seed, *(zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(seed: int, *keys: int | str) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, for code that draws from them (dropout)."""
    mixed = derive_seed(seed, *keys)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002  (third-party code draws from the global generator)
    torch.manual_seed(mixed)


class SampleRNG:
    """Random draws for the samples of one micro-batch.

    Args:
        seed: the run's seed.
        index: global sample indices of the micro-batch, length B.
        device: where the draws are delivered.
    """

    def __init__(self, seed: int, index: Tensor | Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.index: list[int] = [int(i) for i in index]
        self.device = torch.device(device)

    def _generators(self, name: str) -> Iterable[torch.Generator]:
        for index in self.index:
            yield torch.Generator().manual_seed(derive_seed(self.seed, name, index))

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal draws, (B, *shape) in fp32; the same `name` gives the same numbers."""
        draws = [torch.randn(tuple(shape), generator=g) for g in self._generators(name)]
        return torch.stack(draws).to(self.device)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Draws from [0, 1), (B, *shape) in fp32; the same `name` gives the same numbers."""
        draws = [torch.rand(tuple(shape), generator=g) for g in self._generators(name)]
        return torch.stack(draws).to(self.device)
