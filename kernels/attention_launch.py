"""How the attention kernels are launched: strides, tiles, grids, and what is compiled ahead of time.

Shapes: B batch, H heads, M queries, N keys, D width of a head.
"""

import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dtrain.kernels.block_mask import BlockMask
from dtrain.kernels.launch import SHARED_BYTES, AotCase, arch_of, can_launch, triton
from dtrain.kernels.tiles import Tile, tiles

__all__ = ["HEAD_DIMS", "SIZES", "Pass", "cases", "empty_like", "empty_lse", "readable", "refusal"]

_log = logging.getLogger(__name__)

HEAD_DIMS = range(32, 129, 8)

# What changes from call to call without a new kernel.
SIZES = [f"stride_{x}{axis}" for x in "qkvogw" for axis in "bhn"] + ["n_blocks", "H", "M", "N"]

# fp32 is served everywhere rather than tuned: three products of tf32 for each keep all in memory twice.
_FP32_TILE = Tile(block_m=32, block_n=32, num_warps=4, num_stages=1)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernels cannot serve; empty where they can."""
    if not can_launch(device):
        return f"{device.type} tensors need a GPU and Triton, or TRITON_INTERPRET=1 in the environment"
    if dtype not in _DTYPES:
        return f"{dtype} is none of float16, bfloat16 and float32"
    if head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} is not one of {HEAD_DIMS.start}, {HEAD_DIMS[1]} … {HEAD_DIMS[-1]}"
    return ""


def readable(x: Tensor) -> Tensor:
    """x, or a copy where a row is not contiguous, as in the gradient of `out.sum()`."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_like(x_BHND: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, H, N, D) that lies in memory as (B, N, H, D): joining the heads copies nothing."""
    batch, heads, tokens, width = x_BHND.shape
    return x_BHND.new_empty(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)


def empty_lse(q: Tensor) -> Tensor:
    """An empty (B, H, M) in fp32, or fp64 for fp64."""
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@dataclass(frozen=True)
class Pass:
    """One kernel of attention, as the tables name it.

    Args:
        name: "forward" and so on, a key of `TILES["attention"]`.
        kernel: takes pointers, BLOCKS, ENTRIES, strides, n_blocks, H, M, N, scale and the constexprs.
        owner: whose block a program owns: that of queries or of keys.
        pointers, strided: names of its first pointers, and which of them have strides.
        absent: pointers that are None.
    """

    name: str
    kernel: Any
    owner: Literal["queries", "keys"]
    pointers: tuple[str, ...]
    strided: tuple[str, ...]
    absent: tuple[str, ...] = ()

    def launch(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        mask: BlockMask | None,
        tensors: Mapping[str, Tensor | None],
        tile: Tile | None = None,
    ) -> None:
        """Run on (B, H, M, D) queries and (B, H, N, D) keys.

        Args:
            tensors: by the names of `pointers`.
            tile: instead of the table's.
        """
        batch, heads, queries, head_dim = q.shape
        keys = k.shape[2]
        tile = tile or self.tile(arch_of(q.device), head_dim, q.dtype)
        unit, strides = _strides([x for name in self.strided if (x := tensors[name]) is not None])
        tma = tile.tma and unit == 8 and all(t is None or t.data_ptr() % 16 == 0 for t in tensors.values())
        if tile.tma and not tma:
            _say_pointers(self.name)
        constants = _constants(tile, head_dim, q.dtype, unit, tma, mask.block if mask else None)
        lists: Any = getattr(mask, self.owner) if mask else (None, None)
        own, sub = ("M", "SUB_M") if self.owner == "queries" else ("N", "SUB_N")
        tokens = queries if self.owner == "queries" else keys
        blocks = len(lists[0]) if mask else -(-tokens // constants[f"BLOCK_{own}"])
        if tma:
            triton.set_allocator(_scratch)
        with torch.cuda.device_of(q):
            self.kernel[(batch * heads * blocks * constants[sub],)](
                *(tensors[name] for name in self.pointers), *lists, *strides,
                blocks, heads, queries, keys, scale / math.log(2), **constants, **tile.options,
            )  # fmt: skip

    def tile(self, arch: str, head_dim: int, dtype: torch.dtype) -> Tile:
        """The table's tile."""
        return _FP32_TILE if dtype == torch.float32 else tiles("attention", self.name, arch, head_dim)

    def case(
        self, arch: str, head_dim: int, block: tuple[int, int] | None = None, tile: Tile | None = None
    ) -> AotCase:
        """What to compile ahead of time, in bf16.

        Args:
            block: of a block mask; without one when None.
            tile: instead of the table's.
        """
        tile = tile or self.tile(arch, head_dim, torch.bfloat16)
        constants = _constants(tile, head_dim, torch.bfloat16, 8, tile.tma, block)
        absent = (*self.absent, *(() if block else ("BLOCKS", "ENTRIES")))
        constants |= dict.fromkeys(absent)
        signature = {x: _type(x) for x in self.kernel.arg_names if x not in constants}
        lists = f"blocks {block[0]}x{block[1]}" if block else "dense"
        return AotCase(
            name=f"attention.{self.name} D={head_dim} {lists}",
            kernel=self.kernel,
            arch=arch,
            signature=signature,
            constexprs=constants,
            divisible=tuple(x for x, kind in signature.items() if kind.startswith("*")),
            options=tile.options,
            max_spills=tile.max_spills,
        )


def cases(passes: Sequence[Pass]) -> Iterator[AotCase]:
    """Every kernel in bf16 on every architecture: dense and by lists, with and without a tail."""
    for arch in SHARED_BYTES:
        for one in passes:
            for head_dim in (64, 72, 96, 112, 128):
                for block in (None, (128, 128)):
                    yield one.case(arch, head_dim, block)
            for head_dim in (64, 128):
                yield one.case(arch, head_dim, (64, 64))


@functools.cache
def _say_pointers(name: str) -> None:
    _log.info("attention %s: rows do not start at 16 bytes, so pointers read them, not descriptors", name)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    # Tensor descriptors are made in memory that the kernel asks for. `alignment` is 128, PyTorch gives 512.
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _strides(tensors: Sequence[Tensor]) -> tuple[int, list[int]]:
    """UNIT and the strides of (B, H, N) in it; that of a dim of size 1 is arbitrary, so the width will do."""
    strides = [
        s if n > 1 else x.shape[3] for x in tensors for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    unit = 1 if any(s % 8 for s in strides) else 8
    return unit, [s // unit for s in strides]


def _precision(dtype: torch.dtype) -> str:
    """How fp32 is multiplied: as three products of tf32, or as one where PyTorch may do so."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"  # AMD's matrix cores multiply fp32


def _constants(
    tile: Tile, head_dim: int, dtype: torch.dtype, unit: int, tma: bool, block: tuple[int, int] | None
) -> dict[str, Any]:
    main = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - main
    block_m, block_n = tile.block_m, tile.block_n
    if block is not None:
        block_m, block_n = min(block_m, block[0]), min(block_n, block[1])
    return {
        "D": head_dim,
        "MAIN": main,
        "TAIL": max(16, 1 << (rest - 1).bit_length()) if rest else 0,  # a product sums over at least 16
        "UNIT": unit,
        "PRECISION": _precision(dtype),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "SUB_M": block[0] // block_m if block else 1,
        "SUB_N": block[1] // block_n if block else 1,
        "TMA": tma,
    }


def _type(argument: str) -> str:
    if argument in ("BLOCKS", "ENTRIES"):
        return "*i32"
    if argument in ("LSE", "DLSE", "DELTA", "SUM"):
        return "*fp32"
    if argument == "scale":
        return "fp32"
    return "i32" if argument in SIZES else "*bf16"
