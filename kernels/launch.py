"""What a kernel is launched with: a tile for each GPU by table, and Triton itself where it is installed.

A tile is read from `TILES`, never timed: timing inside a training step stalls it, and ranks that time alone
choose differently. A JSON file named by the environment variable DTRAIN_TILES is laid over the table, nested
like it: {"attention": {"forward": {"sm_90": {"64": {"block_m": 128, "block_n": 128, ...}}}}}. The row "64"
serves head dims up to 64, down to the next smaller row.

Kernel files write `from dtrain.kernels.launch import tl, triton`, so that they import without Triton too.
Their `aot_cases()` say what `dtrain.kernels.aot` compiles for GPUs that are not there.
"""

import functools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "HAS_TRITON", "triton", "tl", "can_launch",
    "SHARED_BYTES", "arch_of", "known_arch",
    "Tile", "TILES", "read_tiles", "tiles",
    "AotCase",
]  # fmt: skip


class _Absent:
    """Stands where Triton would: kernels can be defined with it, not launched."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # its wheels are for Linux only
    triton = tl = _Absent()
    HAS_TRITON = False

_log = logging.getLogger(__name__)

# Shared memory that one block may ask for. Sources: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability", less the 1 KiB that CUDA keeps for itself; AMD CDNA 3 ISA guide (local data share).
SHARED_BYTES = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}


def can_launch(device: torch.device) -> bool:
    """Whether Triton runs kernels on tensors of `device`: on a GPU, or on the CPU in Triton's interpreter."""
    interpreted = device.type == "cpu" and HAS_TRITON and bool(triton.knobs.runtime.interpret)
    return interpreted or (device.type == "cuda" and HAS_TRITON)


def arch_of(device: torch.device) -> str:
    """Architecture of a GPU, such as "sm_90"; the interpreter, on the CPU, borrows the tiles of "sm_80"."""
    if device.type == "cpu":
        return "sm_80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def known_arch(arch: str) -> str:
    """`arch` itself where `SHARED_BYTES` has it, else the nearest older one of its family, said once.

    Raises:
        ValueError: there is none.
    """
    family, number = _generation(arch)
    older = [a for a in SHARED_BYTES if _generation(a) <= (family, number) and _generation(a)[0] == family]
    if not older:
        raise ValueError(f"arch = {arch}: no kernel is made for it; known are {', '.join(SHARED_BYTES)}")
    nearest = max(older, key=_generation)
    if nearest != arch:
        _log.warning("%s has no launch parameters of its own: its kernels use those of %s", arch, nearest)
    return nearest


def _generation(arch: str) -> tuple[str, int]:
    """("sm_", 90), ("gfx", 0x942): compute capabilities are decimal, AMD's targets hexadecimal."""
    if arch.startswith("sm_"):
        return "sm_", int(arch.removeprefix("sm_"))
    return "gfx", int(arch.removeprefix("gfx"), 16)


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched: the block of the output that a program owns, and how it is compiled.

    Args:
        block_m, block_n: rows (queries) and columns (keys) of a block of scores; powers of two.
        num_warps: warps of a program; a power of two.
        num_stages: depth of the software pipeline over the inner loop.
        max_spills: spill stores that `dtrain.kernels.aot` lets pass.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_spills: int = 0

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "num_warps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name} = {value!r}: must be a power of two")
        for name, least in (("num_stages", 1), ("max_spills", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} = {value!r}: must be an integer, at least {least}")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch. Fused multiply-add is asked for by name: its default changes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# Operation -> pass -> architecture -> largest head dim that the tile serves -> tile.
Table = Mapping[str, Mapping[str, Mapping[str, Mapping[int, Tile]]]]

# GPUs whose tensor cores run mma.sync. What fits the least shared memory among them serves all.
_MMA_SYNC = ("sm_80", "sm_86", "sm_89", "sm_120")

# The largest tiles without a spill store, by `dtrain.kernels.aot` with Triton 3.6 and 3.9; not timed.
TILES: Table = {
    "attention": {
        "forward": {
            **{arch: {64: Tile(128, 32, 4, 3), 128: Tile(128, 64, 8, 3)} for arch in _MMA_SYNC},
            "sm_90": {96: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2)},
            "sm_100": {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3)},
            "gfx942": {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2)},
        },
        "backward_dkdv": {
            **{arch: {96: Tile(32, 128, 8, 2), 128: Tile(64, 64, 8, 2)} for arch in _MMA_SYNC},
            "sm_90": {128: Tile(64, 128, 8, 2)},
            "sm_100": {96: Tile(64, 128, 8, 2), 128: Tile(64, 64, 8, 2)},
            "gfx942": {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2)},
        },
        "backward_dq": {
            **{arch: {128: Tile(128, 32, 8, 2)} for arch in _MMA_SYNC},
            "sm_90": {128: Tile(128, 64, 8, 3)},
            "sm_100": {128: Tile(128, 64, 8, 3)},
            "gfx942": {64: Tile(64, 64, 4, 2), 128: Tile(128, 32, 8, 2)},
        },
    },
}


def tiles(op: str, pass_name: str, arch: str, head_dim: int) -> Tile:
    """The tile of one pass of an operation: of the smallest row that reaches `head_dim`.

    Rows of the file DTRAIN_TILES come first. An architecture without rows uses those of `known_arch`.

    Args:
        op, pass_name: "attention", "forward" and so on: keys of `TILES`.
        arch: as `arch_of` gives it.

    Raises:
        ValueError: no row reaches `head_dim`, the architecture is too old, or the file is wrong.
    """
    return _tile(op, pass_name, arch, head_dim, os.environ.get("DTRAIN_TILES", ""))


@functools.cache
def _tile(op: str, pass_name: str, arch: str, head_dim: int, path: str) -> Tile:
    own = read_tiles(path) if path else {}
    rows = dict(TILES[op][pass_name][known_arch(arch)])
    for name in (known_arch(arch), arch):
        rows |= own.get(op, {}).get(pass_name, {}).get(name, {})
    fitting = [reach for reach in rows if reach >= head_dim]
    if not fitting:
        raise ValueError(f"head_dim = {head_dim}: {op} {pass_name} on {arch} serves at most {max(rows)}")
    return rows[min(fitting)]


@functools.cache
def read_tiles(path: str) -> Table:
    """The table in a JSON file, see DTRAIN_TILES; its use is said once.

    Raises:
        ValueError: the file cannot be read, or names what is not in `TILES`.
    """
    try:
        table: Table = {
            op: {
                pass_name: {
                    arch: {int(reach): Tile(**fields) for reach, fields in rows.items()}
                    for arch, rows in archs.items()
                }
                for pass_name, archs in passes.items()
            }
            for op, passes in json.loads(Path(path).read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"DTRAIN_TILES = {path}: {error}") from error
    for op, passes in table.items():
        for unknown in passes.keys() - TILES.get(op, {}).keys():
            raise ValueError(f"DTRAIN_TILES = {path}: {op}.{unknown}: no such pass of an operation")
    _log.info("launch parameters from %s come before the shipped ones", path)
    return table


@dataclass(frozen=True)
class AotCase:
    """One kernel with one set of launch parameters, to be compiled for a GPU that need not be there.

    Args:
        name: unique on its architecture, such as "attention.forward D=72 bf16".
        kernel: the function that `triton.jit` made.
        arch: a key of `SHARED_BYTES`.
        signature: type of every argument that is not a constexpr: "*bf16", "i32", "i64", "fp32".
        constexprs: value of every constexpr. A stride of one belongs here, as Triton itself puts it.
        divisible: arguments, pointers and integers, that are multiples of 16: they allow 16-byte loads.
        tile: gives `options` and the spill stores allowed.
        tensor_cores: whether the kernel multiplies matrices.
    """

    name: str
    kernel: Any
    arch: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...]
    tile: Tile
    tensor_cores: bool = True
