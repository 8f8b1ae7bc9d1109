"""The linear layer that joins a block's input with its long skip, as one operator without a concatenation.

    out = cat([x, skip])·Wᵀ + b = x·W₁ᵀ + skip·W₂ᵀ + b        W = [W₁ W₂]

The second product adds to the first in place. Backwards the two halves of W's gradient are written where
they belong. The gradients of x and of skip are tensors of their own: those of cat are views of one, which
the gradient of a skip, wanted only blocks later, would keep in memory as a whole.

Shapes: R rows, D width of x, S of skip, E of the output.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dtrain.kernels import reference
from dtrain.kernels.linear import (
    as_rows,
    check_layer,
    compute_dtype,
    empty_grads,
    in_shape,
    linear,
    of_asked,
    sum_rows,
)
from dtrain.kernels.op import Operator

__all__ = ["skip_linear"]


def _halves(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that act on x, and those that act on skip."""
    width = x.shape[-1]
    return weight[:, :width], weight[:, width:]


def _forward_op(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    of_x, of_skip = _halves(weight.to(x.dtype), x)
    out = linear(as_rows(x), of_x, bias)
    return out.addmm_(as_rows(skip), of_skip.t()).view(*x.shape[:-1], weight.shape[0])


def _backward_op(
    grad: Tensor, x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    grad = as_rows(grad)
    of_x, of_skip = _halves(weight.to(x.dtype), x)
    grad_weight = None
    if needs[2]:
        grad_weight = grad.new_empty(weight.shape)
        for rows, columns in zip((x, skip), _halves(grad_weight, x), strict=True):
            torch.mm(grad.t(), as_rows(rows), out=columns)
    grads = (
        grad @ of_x if needs[0] else None,
        grad @ of_skip if needs[1] else None,
        grad_weight,
        sum_rows(grad, bias.dtype) if bias is not None and needs[3] else None,
    )
    return in_shape(grads, (x, skip, weight, bias), needs)


def _forward_flops(x: Any, skip: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(x[:-1]) * math.prod(weight))


def _backward_flops(grad: Any, x: Any, skip: Any, weight: Any, bias: Any, needs: Any, **_: Any) -> int:
    columns = needs[0] * x[-1] + needs[1] * skip[-1] + needs[2] * weight[1]
    return int(2 * math.prod(grad) * columns)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    return tuple(of_asked(_backward(grad, *ctx.saved_tensors, needs), needs))


_INPUTS = "Tensor x, Tensor skip, Tensor weight, Tensor? bias"

_backward = Operator(
    f"dtrain::skip_linear_backward(Tensor grad, {_INPUTS}, bool[] needs)"
    " -> (Tensor grad_x, Tensor grad_skip, Tensor grad_weight, Tensor grad_bias)",
    cpu=_backward_op,
    cuda=_backward_op,
    fake=lambda grad, *args: empty_grads(args[:4], args[-1]),
    flops=_backward_flops,
)
_forward = Operator(
    f"dtrain::skip_linear({_INPUTS}) -> Tensor",
    cpu=_forward_op,
    cuda=_forward_op,
    fake=lambda x, skip, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    flops=_forward_flops,
    save=_save,
    backward=_differentiate,
)


def skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(cat([x, skip]), weight, bias), differentiable, without the concatenation either way.

    Dtypes are those of F.linear, under autocast too, except that the bias may be wider. Sums come in another
    order than those of one product over both.

    Args:
        x: (..., D), any strides.
        skip: (..., S), as many rows as x, any strides.
        weight: (E, D + S); the first D columns act on x.
        bias: (E,) or None.
    Returns: (..., E).
    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if x.shape[:-1] != skip.shape[:-1]:
        raise ValueError(f"x {tuple(x.shape)}, skip {tuple(skip.shape)}: must agree in all but the last dim")
    check_layer(x.shape[-1] + skip.shape[-1], weight, bias, ("weight", "bias"))
    x, skip = compute_dtype({"x": x, "skip": skip}, {"weight": weight}, {"bias": bias})
    if x.device.type not in ("cpu", "cuda", "meta"):
        return reference.skip_linear(x, skip, weight, bias)
    out: Tensor = _forward(x, skip, weight, bias)
    return out
