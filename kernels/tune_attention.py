"""What `tune` asks of attention: candidate tiles, and calls that launch, check and time them.

A candidate is a power-of-two block of queries and keys, warps, stages and how rows are read. Those whose sums
and scores cannot fit the registers are not listed; scores count twice, for what is made of them:

    (rows owned · D · sums + 2 · queries · keys) / (32 · warps) ≤ 195 registers of a thread's 255

Shapes: B batch, H heads, N tokens, D width of a head.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtrain.kernels import attention_backward, attention_forward, reference
from dtrain.kernels.attention_launch import HEAD_DIMS
from dtrain.kernels.block_mask import BlockMask, packed
from dtrain.kernels.launch import AotCase
from dtrain.kernels.tiles import Tile, tiles

__all__ = ["HEAD_DIMS", "PASSES", "Problem", "aot_case", "candidates", "errors", "run", "sdpa_calls"]

PASSES = ("forward", "backward_dq", "backward_dkdv", "backward_fused")

_BY_NAME = {p.name: p for p in (*attention_forward.PASSES, *attention_backward.PASSES)}
# Sums in registers that a program keeps of its own rows; a pass by keys owns block_n rows.
_SUMS = {"forward": 1, "backward_dq": 1, "backward_dkdv": 2, "backward_fused": 2}
_REGISTERS = 195
_HAS_TMA = ("sm_90", "sm_100", "sm_120")


def candidates(pass_name: str, arch: str, head_dim: int) -> list[Tile]:
    """Tiles worth compiling: the shipped one, then the rest, those first that differ from it least."""
    shipped = tiles("attention", pass_name, arch, head_dim)
    by_keys = pass_name in ("backward_dkdv", "backward_fused")
    inner, outer, stages = (32, 64, 128), (64, 128), (1, 2, 3) if by_keys else (2, 3, 4)
    found = [
        Tile(*((i, o) if by_keys else (o, i)), num_warps=warps, num_stages=depth, tma=tma)
        for o, i, warps, depth, tma in itertools.product(
            outer, inner, (4, 8), stages, (False, True) if arch in _HAS_TMA else (False,)
        )
    ]
    fitting = [t for t in found if t != shipped and _registers(pass_name, t, head_dim) <= _REGISTERS]
    return [shipped, *sorted(fitting, key=lambda t: (_distance(t, shipped), -t.block_m * t.block_n))]


def _distance(tile: Tile, other: Tile) -> int:
    """In how many fields two tiles differ."""
    pairs = zip(astuple(tile), astuple(other), strict=True)
    return sum(a != b for a, b in pairs)


def _registers(pass_name: str, tile: Tile, head_dim: int) -> float:
    owned = tile.block_n if "dkdv" in pass_name or "fused" in pass_name else tile.block_m
    sums = owned * head_dim * _SUMS[pass_name]
    return (sums + 2 * tile.block_m * tile.block_n) / (32 * tile.num_warps)


def aot_case(pass_name: str, arch: str, head_dim: int, tile: Tile) -> AotCase:
    """To see, without a GPU, whether a candidate spills or asks for too much shared memory."""
    return _BY_NAME[pass_name].case(arch, head_dim, tile=tile)


@dataclass(frozen=True)
class Problem:
    """Attention of one size on random inputs, views of a packed qkv.

    Args:
        clips: how many clips lie one after the other in the tokens, each for itself; 1: no mask.
    """

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    tokens: int
    head_dim: int
    clips: int = 1

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, D)."""
        shape = (self.batch, self.tokens, 3, self.heads, self.head_dim)
        q, k, v = self._draw(*shape).permute(2, 0, 3, 1, 4)
        return q, k, v

    @cached_property
    def grad(self) -> Tensor:
        """Gradient of the output, (B, H, N, D)."""
        return self._draw(self.batch, self.tokens, self.heads, self.head_dim).transpose(1, 2)

    @cached_property
    def mask(self) -> BlockMask | None:
        if self.clips == 1:
            return None
        ends = [self.tokens * i // self.clips for i in range(self.clips + 1)]
        return packed(ends).to(self.device)

    @cached_property
    def forward(self) -> tuple[Tensor, Tensor]:
        """out and lse, with the table's tile: what a backward pass starts from."""
        return run_forward(self, None)

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def _draw(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(len(shape))
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)


def run_forward(problem: Problem, tile: Tile | None) -> tuple[Tensor, Tensor]:
    return attention_forward.forward(*problem.qkv, problem.scale, problem.mask, tile)


def run_backward(
    problem: Problem, form: attention_backward.Form, own: Mapping[str, Tile]
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward.backward(
        problem.grad, None, *problem.qkv, *problem.forward, problem.scale, problem.mask, form, tiles=own
    )


def run(problem: Problem, pass_name: str, tile: Tile) -> dict[str, Tensor]:
    """The call in which a candidate takes part; the passes beside it use the table's tiles.

    Returns: what it makes, by name.
    """
    if pass_name == "forward":
        return dict(zip(("out", "lse"), run_forward(problem, tile), strict=True))
    form: Literal["split", "fused"] = "fused" if pass_name == "backward_fused" else "split"
    return dict(zip(("dq", "dk", "dv"), run_backward(problem, form, {pass_name: tile}), strict=True))


def errors(problem: Problem, made: Mapping[str, Tensor]) -> dict[str, float]:
    """‖x - exact‖ / ‖exact‖ of what `run` made, against the reference in fp64; NaN where it is."""
    exact = _exact(problem)
    return {name: float((x.double() - exact[name]).norm() / exact[name].norm()) for name, x in made.items()}


def _exact(problem: Problem) -> dict[str, Tensor]:
    assert problem.mask is None, "checked on all pairs"
    q, k, v = (x.double() for x in problem.qkv)
    out, lse = reference.attention_with_lse(q, k, v, problem.scale)
    grads = reference.attention_backward(problem.grad.double(), None, q, k, v, out, lse, problem.scale)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def sdpa_calls(problem: Problem) -> Iterator[tuple[str, "SDPACall"]]:
    """SDPA's kernels by name; one that cannot serve raises when it is called."""
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):
        yield backend.name.lower(), SDPACall(problem, backend)


class SDPACall:
    """One of PyTorch's kernels, forwards and backwards, without a mask."""

    def __init__(self, problem: Problem, backend: SDPBackend) -> None:
        self.problem, self.backend = problem, backend
        self.leaves = tuple(x.detach().requires_grad_() for x in problem.qkv)

    def __call__(self) -> None:
        with sdpa_kernel(self.backend):
            q, k, v = self.leaves
            out = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out, self.leaves, self.problem.grad)
