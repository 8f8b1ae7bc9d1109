"""Cases of QK-norm and rotation before attention: ours in one pass, against PyTorch's parts.

Bound by memory. With u = B·N·H·D elements: forwards reads 3u and writes 3u; backwards reads the three
gradients, queries and keys, 5u, and writes 3u. PyTorch's parts leave the values where they are forwards, and
join three gradients backwards, for which ours copies the values.
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention.operation import OURS, Pass
from benchmarks.attention.plan import LeftOut, Plan, Settings, Triple
from benchmarks.attention.problem import Shape, relative_error
from benchmarks.baselines.plain_attention import rotate
from benchmarks.case import Case, Cost, Gate, Setup, Timed
from dtrain.kernels.qk_norm_rope import backward_bytes, forward_bytes, qk_norm_rope
from dtrain.kernels.reference import rope_angles

__all__ = ["norm_rope_plans"]

_EPS = 1e-6

# Packed qkv (B, N, 3, H, D), weights of the norms (D,), cos and sin (N, D/2), to q, k, v (B, H, N, D).
Function: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def plain(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """As one writes it; values stay where they are."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = (F.rms_norm(x, x.shape[-1:], w, _EPS) for x, w in ((q, q_weight), (k, k_weight)))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def ours(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return qk_norm_rope(
        qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin, eps=_EPS, backend="triton"
    )


class Inputs:
    """Of one size, and the truth about them."""

    def __init__(self, settings: Settings, shape: Shape, grid: Triple) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(settings.device, settings.dtype)

        heads = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
        self.leaves = [draw(*heads[:2], 3, *heads[2:]), 1 + draw(shape.head_dim), 1 + draw(shape.head_dim)]
        self.grads = [draw(*heads).transpose(1, 2) for _ in range(3)]
        angles = rope_angles(grid, shape.head_dim, device=settings.device)
        self.tables = [angles.cos(), angles.sin()]

    @cached_property
    def exact(self) -> list[Tensor]:
        """q, k, v and the gradients, in fp64."""
        return Step(self, plain, "backward", torch.float64).results()


class Step:
    """One pass, or the other; a forward pass keeps what its backward would need until the call returns."""

    def __init__(
        self, inputs: Inputs, function: Function, way: Pass, dtype: torch.dtype | None = None
    ) -> None:
        self.inputs, self.function, self.way = inputs, function, way
        self.leaves = [x.to(dtype or x.dtype).requires_grad_() for x in inputs.leaves]
        self.grads = [g.to(dtype or g.dtype) for g in inputs.grads]
        self.outputs = self._forward() if way == "backward" else ()

    def __call__(self) -> tuple[Tensor, ...]:
        if self.way == "forward":
            return self._forward()
        return torch.autograd.grad(self.outputs, self.leaves, self.grads, retain_graph=True)

    def results(self) -> list[Tensor]:
        return [x.detach() for x in (*self.outputs, *self())]

    def error(self) -> float:
        """The worst of what this pass makes, relative to fp64; NaN where one of them is."""
        pairs = zip(self.results(), self.inputs.exact, strict=False)  # a forward pass makes the first three
        return float(torch.tensor([relative_error(got, want) for got, want in pairs]).max())

    def _forward(self) -> tuple[Tensor, ...]:
        with torch._functorch.config.patch(donated_buffer=False):  # its backward is called many times
            return self.function(*self.leaves, *self.inputs.tables)


def norm_rope_plans(settings: Settings) -> Iterator[Plan]:
    for head_dim in settings.layer_head_dims:
        grid = settings.layer_grids[0]
        tokens = grid[0] * grid[1] * grid[2]
        shape = Shape(max(1, settings.batch_tokens // tokens), settings.heads[head_dim], tokens, head_dim)
        passes: tuple[Pass, ...] = ("forward", "backward")
        for way in passes:
            name = f"qk_norm_rope_{way}_d{head_dim}_n{tokens}"
            yield Plan(name, 0, partial(_make, name, settings, shape, grid, way))


def _make(name: str, settings: Settings, shape: Shape, grid: Triple, way: Pass) -> tuple[Case, list[LeftOut]]:
    inputs = Inputs(settings, shape, grid)
    setups: dict[str, Setup] = {"eager": partial(Step, inputs, plain, way)}
    left_out = []
    if settings.kind == "cuda":
        setups["torch.compile"] = partial(Step, inputs, torch.compile(plain, dynamic=False), way)
    else:
        left_out.append(LeftOut(name, "torch.compile", "not rehearsed on the CPU"))
    setups[OURS] = partial(Step, inputs, ours, way)
    return _case(name, settings, shape, way, setups), left_out


def _case(name: str, settings: Settings, shape: Shape, way: Pass, setups: dict[str, Setup]) -> Case:
    count = forward_bytes if way == "forward" else backward_bytes
    size = settings.dtype.itemsize
    moved = count(shape.batch, shape.tokens, shape.heads, shape.head_dim, size)
    dtype = str(settings.dtype).removeprefix("torch.")
    return Case(
        name=name,
        title=f"QK-norm and rotation, {way}, {shape.batch} × {shape.tokens:,} tokens, {shape.heads} heads × "
        f"{shape.head_dim}, {dtype}",
        baseline="eager",
        contestants=setups,
        gates=(Gate("error over the baseline's", 2.0, lambda work, base: work.error() / base.error()),),
        metrics=(Timed("call_ms"), Timed("bandwidth", "GB/s", "higher", lambda s: moved / s / 1e9)),
        cost=Cost(0, moved, f"{moved // shape.tensor_bytes(size)} tensors of q's size, angles", dtype),
        device=settings.kind,
        rounds=settings.rounds,
        warmup=settings.warmup,
        cold=True,
    )
