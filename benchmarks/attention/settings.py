"""How large attention is: settings for a GPU, a short run on one, and a rehearsal on a CPU."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.sweep import plan
from benchmarks.sweep.plan import Kind

__all__ = ["Settings", "Triple", "settings_for"]

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Settings(plan.Settings):
    """Sizes of a run.

    Args:
        heads: head dim -> heads; their product is the width of a layer.
        batch_tokens: tokens of a batch; one sample where a sample has more.
        windows: grid of tokens, tile and window of the sparse cases.
        layer_grids: frames, rows and columns of tokens of the layer cases.
    """

    heads: Mapping[int, int]
    tokens: tuple[int, ...]
    batch_tokens: int
    windows: tuple[Triple, Triple, Triple]
    window_head_dims: tuple[int, ...]
    layer_head_dims: tuple[int, ...]
    layer_grids: tuple[Triple, ...]


def settings_for(kind: Kind, quick: bool) -> Settings:
    """CPU sizes rehearse the code in Triton's interpreter; their times mean nothing.

    Args:
        quick: on a GPU, two head dims and two lengths.
    """
    if kind == "cpu":
        return Settings(
            kind="cpu",
            dtype=torch.float16,  # bf16 products are wrong in the interpreter
            heads={64: 1} if quick else {64: 1, 72: 1},
            tokens=(48,) if quick else (48, 130),
            batch_tokens=1,
            windows=((2, 4, 8), (2, 4, 2), (2, 4, 6)),
            window_head_dims=(64,),
            layer_head_dims=(64,),
            layer_grids=((2, 4, 6),),
            rounds=1,
            warmup=0,
        )
    return Settings(
        kind="cuda",
        dtype=torch.bfloat16,
        heads={64: 16, 72: 16, 96: 12, 128: 8} if not quick else {64: 16, 72: 16, 128: 8},
        tokens=(4096, 16384) if quick else (1024, 4096, 16384, 65536),
        batch_tokens=32768,
        windows=((20, 48, 36), (4, 8, 4), (12, 24, 12)),
        window_head_dims=(128,) if quick else (64, 72, 128),
        layer_head_dims=(72,) if quick else (64, 72, 128),
        layer_grids=((4, 32, 32),) if quick else ((4, 32, 32), (16, 32, 32)),
        rounds=7 if quick else 11,
    )
