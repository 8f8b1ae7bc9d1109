"""An MLP over pieces of its rows, as one operator that keeps its input only.

    pre = x·W1ᵀ + b1        act = gelu(pre)        out = act·W2ᵀ + b2

Both passes walk over the pieces. Of the hidden layer a piece is in memory forwards, R·H/chunks elements, and
two backwards, where pre is formed again: 14·R·D·H FLOPs rather than 12, for 2·R·H/chunks elements in place of
the 3·R·H at the peak of `gelu_linear`. The gradient of x is written piece by piece to one tensor; those of
the parameters are summed over the pieces.

Shapes: R rows, P rows of a piece, D width of the input, H hidden width, E width of the output.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.kernels.gelu_linear import Approximate, Gelu, Needs
from dtrain.kernels.linear import add_product, as_rows, empty_grads, in_shape, of_asked, sum_rows
from dtrain.kernels.op import Operator

__all__ = ["chunked_mlp", "split_bias"]


def split_bias(w1: Tensor, b1: Tensor | None, fused: bool) -> tuple[Tensor | None, Tensor | None]:
    """The first bias for the first product or, in the other place, for the activation.

    The kernels read it at no cost and add it in fp32; PyTorch would need a pass for that, and so adds it in
    the product unless it is wider.
    """
    in_product = not fused and b1 is not None and b1.dtype == w1.dtype
    return (b1, None) if in_product else (None, b1)


class _Layers(NamedTuple):
    """The parameters in the dtype of the activations, the first bias in one of two places."""

    w1: Tensor
    b1: Tensor | None
    gelu_bias: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gelu: Gelu

    def forward(self, x: Tensor, out: Tensor) -> None:
        """Write the output (P, E) of a piece (P, D)."""
        act = self.gelu.forward(F.linear(x, self.w1, self.b1), self.gelu_bias, spend=True)
        if self.b2 is None:
            torch.mm(act, self.w2.t(), out=out)
        else:
            torch.addmm(self.b2, act, self.w2.t(), out=out)

    def backward(self, grad: Tensor, x: Tensor, grad_x: Tensor | None, sums: "_Sums") -> None:
        """Write the gradient by a piece to `grad_x` and add to those by the parameters, where asked for."""
        needs = Needs(grad_x is not None or sums.w1 is not None, sums.b1 is not None, sums.w2 is not None)
        grad_pre, grad_b1, _ = self.gelu.backward(
            grad, F.linear(x, self.w1, self.b1), self.gelu_bias, self.w2, needs, sums.w2, spend=True
        )
        if sums.b1 is not None and grad_b1 is not None:
            sums.b1.add_(grad_b1)
        if sums.w1 is not None and grad_pre is not None:
            add_product(sums.w1, grad_pre.t(), x)
        if grad_x is not None and grad_pre is not None:
            torch.mm(grad_pre, self.w1, out=grad_x)


class _Sums(NamedTuple):
    """Gradients of the parameters over the pieces so far; None where none is asked for."""

    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None


def _layers(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, gelu: Gelu) -> _Layers:
    first, gelu_bias = split_bias(w1, b1, gelu.fused)
    first, b2 = (None if b is None else b.to(x.dtype) for b in (first, b2))
    return _Layers(w1.to(x.dtype), first, gelu_bias, w2.to(x.dtype), b2, gelu)


def _forward_op(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    approximate: Approximate, chunks: int, fused: bool,
) -> Tensor:  # fmt: skip
    layers = _layers(x, w1, b1, w2, b2, Gelu(approximate, fused))
    out = x.new_empty(*x.shape[:-1], w2.shape[0])
    for piece, place in zip(*(as_rows(t).tensor_split(chunks) for t in (x, out)), strict=True):
        layers.forward(piece, place)
    return out


def _backward_op(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    approximate: Approximate, chunks: int, fused: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    layers = _layers(x, w1, b1, w2, b2, Gelu(approximate, fused))
    grad, rows = as_rows(grad), as_rows(x)
    grad_x = rows.new_empty(rows.shape) if needs[0] else None
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = _Sums(
        w1.new_zeros(w1.shape) if needs[1] else None,
        b1.new_zeros(b1.shape, dtype=wide) if b1 is not None and needs[2] else None,
        w2.new_zeros(w2.shape) if needs[3] else None,
    )
    if any(needs[:4]):
        places = [None] * chunks if grad_x is None else grad_x.tensor_split(chunks)
        for g, piece, place in zip(*(t.tensor_split(chunks) for t in (grad, rows)), places, strict=True):
            layers.backward(g, piece, place, sums)
    grad_b2 = sum_rows(grad, b2.dtype) if b2 is not None and needs[4] else None
    return in_shape([grad_x, *sums, grad_b2], [x, w1, b1, w2, b2], needs)


def _forward_flops(x: Any, w1: Any, b1: Any, w2: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(x[:-1]) * (math.prod(w1) + math.prod(w2)))


def _backward_flops(grad: Any, x: Any, w1: Any, b1: Any, w2: Any, *rest: Any, **_: Any) -> int:
    need_x, need_w1, need_b1, need_w2, _b2 = rest[-1]
    need_pre = need_x or need_w1 or need_b1
    first = (need_pre or need_w2) + need_w1 + need_x  # pre once more, dW1, dx
    second = need_w2 + need_pre
    return int(2 * math.prod(x[:-1]) * (first * math.prod(w1) + second * math.prod(w2)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.how = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    return *of_asked(_backward(grad, *ctx.saved_tensors, *ctx.how, needs), needs), None, None, None


def _shape(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *_: object) -> tuple[int, ...]:
    return *x.shape[:-1], w2.shape[0]


_INPUTS = "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str approximate, int chunks, bool fused"

_backward = Operator(
    f"dtrain::chunked_mlp_backward(Tensor grad, {_INPUTS}, bool[] needs)"
    " -> (Tensor grad_x, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2)",
    cpu=_backward_op,
    cuda=_backward_op,
    fake=lambda grad, *args: empty_grads(args[:5], args[-1]),
    flops=_backward_flops,
)
chunked_mlp = Operator(
    f"dtrain::chunked_mlp({_INPUTS}) -> Tensor",
    cpu=_forward_op,
    cuda=_forward_op,
    fake=lambda *args: args[0].new_empty(_shape(*args)),
    flops=_forward_flops,
    save=_save,
    backward=_differentiate,
    shape=_shape,
)
