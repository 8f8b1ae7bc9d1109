"""What attention is launched with, by table: tiles for each GPU, and who serves where.

Both are read from tables, never timed: timing inside a training step stalls it, and ranks that time alone
choose differently. A JSON file named by the environment variable DTRAIN_TILES is laid over the tables;
`python -m dtrain.kernels.tune` writes one:

    {"attention": {"forward": {"sm_90": {"64": {"block_m": 128, "block_n": 128, ...}}}},
     "choices": {"sm_90": [{"head_dim": 64, "keys": 4096, "sparse": false, "backend": "triton", ...}]}}

The row "64" serves head dims up to 64, down to the next smaller row.
"""

import functools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dtrain.kernels.launch import known_arch

__all__ = ["CHOICES", "TILES", "Choice", "Tile", "choice", "key_steps", "read_tables", "tiles"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched: the block of the output that a program owns, and how it is compiled.

    Args:
        block_m, block_n: rows (queries) and columns (keys) of a block of scores; powers of two.
        num_warps: warps of a program; a power of two.
        num_stages: depth of the software pipeline over the inner loop.
        max_spills: spill stores that `dtrain.kernels.aot` lets pass.
        tma: read the inner loop's rows, and add dq, by tensor descriptors: the bulk copy engine of sm_90 on.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_spills: int = 0
    tma: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "num_warps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name} = {value!r}: must be a power of two")
        for name, least in (("num_stages", 1), ("max_spills", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} = {value!r}: must be an integer, at least {least}")
        if not isinstance(self.tma, bool):
            raise ValueError(f"tma = {self.tma!r}: must be true or false")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch. Fused multiply-add is asked for by name: its default changes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# Operation -> pass -> architecture -> largest head dim that the tile serves -> tile.
Table = Mapping[str, Mapping[str, Mapping[str, Mapping[int, Tile]]]]

# GPUs whose tensor cores run mma.sync. What fits the least shared memory among them serves all.
_MMA_SYNC = ("sm_80", "sm_86", "sm_89", "sm_120")

# The largest tiles without a spill store (elsewhere than on sm_90: few), by `dtrain.kernels.aot` with Triton
# 3.6 and 3.9; not timed.
TILES: Table = {
    "attention": {
        "forward": {
            **{
                arch: {
                    64: Tile(128, 32, 4, 3),
                    80: Tile(128, 64, 8, 3),
                    128: Tile(64, 64, 8, 3, max_spills=8),
                }
                for arch in _MMA_SYNC
            },
            "sm_120": {64: Tile(128, 32, 4, 3), 128: Tile(128, 32, 8, 3)},
            "sm_90": {80: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2)},
            "sm_100": {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3)},
            "gfx942": {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2)},
        },
        "backward_dkdv": {
            **{
                arch: {
                    96: Tile(32, 128, 8, 2, max_spills=2),
                    120: Tile(64, 32, 8, 2, max_spills=1),
                    128: Tile(64, 64, 8, 2),
                }
                for arch in _MMA_SYNC
            },
            "sm_90": {96: Tile(64, 128, 8, 2), 128: Tile(64, 64, 8, 3)},
            "sm_100": {96: Tile(64, 128, 8, 2, max_spills=1), 128: Tile(64, 64, 8, 2, max_spills=2)},
            "gfx942": {64: Tile(64, 64, 4, 2, max_spills=2), 128: Tile(32, 64, 4, 2)},
        },
        "backward_dq": {
            **{arch: {128: Tile(128, 32, 8, 2, max_spills=1)} for arch in _MMA_SYNC},
            "sm_90": {128: Tile(128, 64, 8, 3)},
            "sm_100": {128: Tile(128, 64, 8, 3, max_spills=2)},
            "gfx942": {64: Tile(64, 64, 4, 2), 128: Tile(128, 32, 8, 2)},
        },
        "backward_fused": {
            **{
                arch: {
                    64: Tile(32, 128, 8, 2),
                    80: Tile(32, 64, 8, 2),
                    120: Tile(32, 32, 4, 2, max_spills=12),
                    128: Tile(64, 64, 8, 2),
                }
                for arch in _MMA_SYNC
            },
            "sm_90": {
                80: Tile(64, 128, 8, 2),
                96: Tile(64, 64, 8, 2),
                120: Tile(32, 128, 8, 2),
                128: Tile(64, 64, 8, 2),
            },
            "sm_100": {64: Tile(64, 128, 8, 2), 128: Tile(64, 64, 8, 2)},
            "gfx942": {
                96: Tile(64, 64, 4, 1),
                120: Tile(32, 64, 4, 2, max_spills=7),
                128: Tile(32, 32, 4, 2),
            },
        },
    },
}


@dataclass(frozen=True)
class Choice:
    """Who was measured to serve best where head dim, keys and density are at most these.

    Args:
        head_dim, keys: the largest that the row serves.
        sparse: whether it serves calls with a block mask, or those without.
        backend: "triton" is this project's kernel, "sdpa" PyTorch's.
        backward: the form of our backward: "split" repeats bit by bit; "fused" does 5 products instead of 7
            and adds dq by atomics. Under `torch.use_deterministic_algorithms` it is always split.
    """

    head_dim: int
    keys: int
    sparse: bool
    backend: Literal["triton", "sdpa"]
    backward: Literal["split", "fused"]

    def __post_init__(self) -> None:
        for name, allowed in (("backend", ("triton", "sdpa")), ("backward", ("split", "fused"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {allowed}")


# Architecture -> rows, of which the first that fits decides. Empty until a GPU has measured: then dense calls
# are PyTorch's, sparse ones ours (SDPA would compute all that the mask leaves out), backwards split.
CHOICES: Mapping[str, tuple[Choice, ...]] = {}


class _Tables(NamedTuple):
    """The tables of one DTRAIN_TILES file."""

    tiles: Table
    choices: Mapping[str, tuple[Choice, ...]]


def tiles(op: str, pass_name: str, arch: str, head_dim: int) -> Tile:
    """The tile of one pass of an operation: of the smallest row that reaches `head_dim`.

    Rows of the file DTRAIN_TILES come first. An architecture without rows uses those of `known_arch`.

    Args:
        op, pass_name: "attention", "forward" and so on: keys of `TILES`.
        arch: as `arch_of` gives it.

    Raises:
        ValueError: no row reaches `head_dim`, the architecture is too old, or the file is wrong.
    """
    return _tile(op, pass_name, arch, head_dim, _path())


def choice(arch: str, head_dim: int, keys: float, sparse: bool) -> Choice | None:
    """The row that decides, of the file DTRAIN_TILES or of `CHOICES`; None where nothing was measured."""
    return next((row for row in _rows(arch, head_dim, sparse) if row.keys >= keys), None)


def key_steps(arch: str, head_dim: int, sparse: bool) -> tuple[int, ...]:
    """The numbers of keys, ascending, at which `choice` may change."""
    return tuple(sorted({row.keys for row in _rows(arch, head_dim, sparse)}))


def _rows(arch: str, head_dim: int, sparse: bool) -> list[Choice]:
    own = read_tables(_path()).choices if _path() else {}
    rows = (*own.get(arch, ()), *CHOICES.get(arch, ()))
    return [row for row in rows if row.head_dim >= head_dim and row.sparse == sparse]


def _path() -> str:
    return os.environ.get("DTRAIN_TILES", "")


@functools.cache
def _tile(op: str, pass_name: str, arch: str, head_dim: int, path: str) -> Tile:
    own = read_tables(path).tiles if path else {}
    rows = dict(TILES[op][pass_name][known_arch(arch)])
    for name in (known_arch(arch), arch):
        rows |= own.get(op, {}).get(pass_name, {}).get(name, {})
    fitting = [reach for reach in rows if reach >= head_dim]
    if not fitting:
        raise ValueError(f"head_dim = {head_dim}: {op} {pass_name} on {arch} serves at most {max(rows)}")
    return rows[min(fitting)]


@functools.cache
def read_tables(path: str) -> _Tables:
    """The tables in a JSON file, see DTRAIN_TILES; its use is said once.

    Raises:
        ValueError: the file cannot be read, or names what is not in `TILES`.
    """
    try:
        content = dict(json.loads(Path(path).read_text()).items())
        rows_of_choices = content.pop("choices", {})
        choices = {arch: tuple(Choice(**row) for row in rows) for arch, rows in rows_of_choices.items()}
        table: Table = {
            op: {
                pass_name: {
                    arch: {int(reach): Tile(**fields) for reach, fields in rows.items()}
                    for arch, rows in archs.items()
                }
                for pass_name, archs in passes.items()
            }
            for op, passes in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"DTRAIN_TILES = {path}: {error}") from error
    for op, passes in table.items():
        for unknown in passes.keys() - TILES.get(op, {}).keys():
            raise ValueError(f"DTRAIN_TILES = {path}: {op}.{unknown}: no such pass of an operation")
    _log.info("launch parameters from %s come before the shipped ones", path)
    return _Tables(table, choices)
