"""Cases of QK-norm and rotation before attention: ours in one pass, against PyTorch's parts.

Bound by memory. With u = B·N·H·D elements: forwards reads 3u and writes 3u; backwards reads the three
gradients, queries and keys, 5u, and writes 3u. PyTorch's parts leave the values where they are forwards, and
join three gradients backwards, for which ours copies the values.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention.problem import Shape
from benchmarks.attention.settings import Settings, Triple
from benchmarks.baselines.plain_attention import rotate
from benchmarks.case import Cost
from benchmarks.sweep.contest import Rivals
from benchmarks.sweep.op import Op, op_plans
from benchmarks.sweep.plan import Plan
from dtrain.kernels.qk_norm_rope import backward_bytes, forward_bytes, qk_norm_rope
from dtrain.kernels.reference import rope_angles

__all__ = ["norm_rope_plans", "op"]

_EPS = 1e-6


def plain(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Packed qkv (B, N, 3, H, D), norms' weights (D,), angles (N, D/2), to q, k, v (B, H, N, D).

    As one writes it; values stay where they are.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = (F.rms_norm(x, x.shape[-1:], w, _EPS) for x, w in ((q, q_weight), (k, k_weight)))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def ours(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return qk_norm_rope(
        qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin, eps=_EPS, backend="triton"
    )


def norm_rope_plans(settings: Settings) -> Iterator[Plan]:
    for head_dim in settings.layer_head_dims:
        grid = settings.layer_grids[0]
        tokens = grid[0] * grid[1] * grid[2]
        batch = max(1, settings.batch_tokens // tokens)
        yield from op_plans(
            settings, op(settings, Shape(batch, settings.heads[head_dim], tokens, head_dim), grid)
        )


def op(settings: Settings, shape: Shape, grid: Triple) -> Op:
    angles = rope_angles(grid, shape.head_dim, device=settings.device)
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    return Op(
        name=("qk_norm_rope", f"d{shape.head_dim}_n{shape.tokens}"),
        title=f"QK-norm and rotation, {shape.batch} × {shape.tokens:,} tokens, {shape.heads} heads × "
        f"{shape.head_dim}",
        rivals=Rivals(partial(plain, **tables), partial(ours, **tables)),
        draw=partial(_draw, settings, shape),
        cost={
            "forward": _cost(settings, shape, forward_bytes),
            "backward": _cost(settings, shape, backward_bytes),
        },
    )


def _draw(settings: Settings, shape: Shape) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(settings.device, settings.dtype)

    heads = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    leaves = [draw(*heads[:2], 3, *heads[2:]), 1 + draw(shape.head_dim), 1 + draw(shape.head_dim)]
    return leaves, [draw(*heads).transpose(1, 2) for _ in range(3)]


def _cost(settings: Settings, shape: Shape, count: Callable[..., int]) -> Cost:
    size = settings.dtype.itemsize
    moved = count(shape.batch, shape.tokens, shape.heads, shape.head_dim, size)
    return Cost(
        0, moved, f"{moved // shape.tensor_bytes(size)} tensors of q's size, angles", settings.dtype_name
    )
