"""Cases of the MLP, of the GELU inside it alone, and of the linear layer that takes in a long skip.

What they must cost, for R rows of width D, a hidden width H = 4·D and b bytes a number:

    MLP            FLOPs = 4·R·D·H, twice that backwards     skip    FLOPs = 4·R·D², twice that backwards
    GELU           bytes = 2·b·R·H forwards: pre read, act written
                   bytes = 4·b·R·H backwards: the gradient read and written, pre read, act written again
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Cost
from benchmarks.fused.settings import Settings, Size
from benchmarks.sweep.call import Routine, call_plans
from benchmarks.sweep.contest import Rivals
from benchmarks.sweep.draw import draws
from benchmarks.sweep.op import Op, op_plans
from benchmarks.sweep.plan import OURS, Plan
from dtrain.kernels import gelu_kernels
from dtrain.kernels.mlp import mlp
from dtrain.kernels.skip import skip_linear

__all__ = ["gelu_routines", "mlp_op", "mlp_plans", "skip_op"]

_RATIO = 4
_CHUNKS = 4


def plain_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def plain_skip(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(torch.cat([x, skip], dim=-1), weight, bias)


def plain_gelu(pre: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(pre + bias)


def our_gelu(pre: Tensor, bias: Tensor) -> Tensor:
    act = torch.empty_like(pre)
    gelu_kernels.forward(pre, bias, "none", act)
    return act


def plain_gelu_backward(grad: Tensor, pre: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Gradients by pre and bias, and the activation, made again."""
    x = pre + bias
    grad = torch.ops.aten.gelu_backward(grad, x)
    return grad, grad.sum(0), F.gelu(x)


def our_gelu_backward(grad: Tensor, pre: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The gradient by pre takes the place of `grad`."""
    act = torch.empty_like(pre)
    sums = gelu_kernels.backward(grad, pre, bias, "none", act, sums=True)
    assert sums is not None
    return grad, sums.to(bias.dtype), act


def mlp_plans(settings: Settings) -> Iterator[Plan]:
    """GELU, skip and MLP of the smaller size; in a run that is not quick, of the larger as well."""
    for size in (settings.images,) if settings.quick else (settings.images, settings.video):
        for routine in gelu_routines(settings, size):
            yield from call_plans(settings, routine)
        yield from op_plans(settings, skip_op(settings, size))
        yield from op_plans(settings, mlp_op(settings, size))


def gelu_routines(settings: Settings, size: Size) -> Iterator[Routine]:
    hidden = _RATIO * size.width
    title = f"GELU of a biased hidden layer, {size.rows:,} × {hidden}"
    unit, vector = size.rows * hidden * settings.dtype.itemsize, hidden * settings.dtype.itemsize
    yield Routine(
        name=f"gelu_forward_{size.label}",
        title=f"{title}, forward",
        rivals=Rivals(plain_gelu, our_gelu),
        draw=partial(_draw_gelu, settings, size.rows, hidden, 1),
        cost=Cost(0, 2 * unit + vector, "pre read, act written"),
    )
    yield Routine(
        name=f"gelu_backward_{size.label}",
        title=f"{title}, backward with the activation again",
        rivals=Rivals(plain_gelu_backward, our_gelu_backward),
        draw=partial(_draw_gelu, settings, size.rows, hidden, 2),
        cost=Cost(0, 4 * unit + 2 * vector, "gradient read and written, pre read, act written"),
        spent=(0,),
    )


def _draw_gelu(settings: Settings, rows: int, hidden: int, tensors: int) -> list[Tensor]:
    draw = draws(settings)
    return [*(draw(rows, hidden) for _ in range(tensors)), draw(hidden)]


def mlp_op(settings: Settings, size: Size) -> Op:
    width, hidden = size.width, _RATIO * size.width
    return _op(
        settings,
        size,
        "mlp",
        f"MLP, {size.words}, {hidden} hidden",
        Rivals(plain_mlp, _our_mlp(1), others={f"{OURS}, {_CHUNKS} chunks": _our_mlp(_CHUNKS)}),
        inputs=1,
        weights=[(hidden, width), (width, hidden)],
    )


def _our_mlp(chunks: int) -> Any:
    return partial(mlp, chunks=chunks, backend="triton")


def skip_op(settings: Settings, size: Size) -> Op:
    return _op(
        settings,
        size,
        "skip",
        f"Linear layer of input and skip, {size.words} each",
        Rivals(plain_skip, skip_linear),
        inputs=2,
        weights=[(size.width, 2 * size.width)],
    )


def _op(
    settings: Settings,
    size: Size,
    name: str,
    title: str,
    rivals: Rivals,
    inputs: int,
    weights: Sequence[tuple[int, int]],
) -> Op:
    """Linear layers from `inputs` tensors of the size to one, with their biases."""
    matrices = sum(rows * columns for rows, columns in weights)
    flops = 2 * size.rows * matrices
    parameters = (matrices + sum(rows for rows, _ in weights)) * settings.dtype.itemsize
    activations = (inputs + 1) * size.rows * size.width * settings.dtype.itemsize
    return Op(
        name=(name, size.label),
        title=title,
        rivals=rivals,
        draw=partial(_draw, settings, size, inputs, weights),
        cost={
            "forward": Cost(flops, activations + parameters, "products; inputs, output, parameters once"),
            "backward": Cost(
                2 * flops, 2 * (activations + parameters), "two products for each; all, and their gradients"
            ),
        },
    )


def _draw(
    settings: Settings, size: Size, inputs: int, weights: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor]]:
    draw = draws(settings)
    *activations, grad = (draw(size.samples, size.tokens, size.width) for _ in range(inputs + 1))
    for shape in weights:
        activations += [draw(*shape) / shape[1] ** 0.5, draw(shape[0])]
    return activations, [grad]
