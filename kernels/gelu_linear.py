"""GELU and the linear layer behind it as one operator that keeps the activation's input only.

    out = gelu(pre + bias)·Wᵀ + out_bias

Autograd would keep pre for GELU and its output for the linear layer, H elements a row each; here that output
is a temporary, which the backward pass makes again. The kernel does so while it turns the gradient of the
activation into that of pre, for which it reads pre anyhow.

    dact = dout·W        dpre = dact ∘ gelu'(pre + bias)        dW = doutᵀ·act        dbias = Σ dpre

The passes of the kernel are bound by memory: forwards reads pre and writes the activation, 2·R·H elements;
backwards reads pre and dact and writes the activation and dpre, 4·R·H. The products are PyTorch's.

Shapes: R rows, H hidden width, E width of the output.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.kernels import gelu_kernels as kernels
from dtrain.kernels import mlp_reference as reference
from dtrain.kernels.linear import (
    add_product,
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
from dtrain.kernels.serving import Backend, kernels_serve

__all__ = [
    "Approximate", "gelu_linear", "forward_bytes", "backward_bytes",
    "Gelu", "Needs", "Path", "gelu_linear_op", "serving",
]  # fmt: skip

Approximate = Literal["none", "tanh"]
Path = Literal["kernels", "passes", "reference"]


def forward_bytes(rows: int, hidden: int, itemsize: int = 2, bias_itemsize: int = 2) -> int:
    """Bytes that the pass from pre to the activation moves; `bias_itemsize` 0 without a bias."""
    return (2 * rows * itemsize + bias_itemsize) * hidden


def backward_bytes(rows: int, hidden: int, itemsize: int = 2, bias_itemsize: int = 2, sums: int = 0) -> int:
    """Bytes that the pass back moves, with `sums` partial sums of the bias' gradient, written and read."""
    return (4 * rows * itemsize + bias_itemsize + 2 * 4 * sums) * hidden


class Needs(NamedTuple):
    """Which gradients are asked for."""

    pre: bool
    bias: bool
    weight: bool

    @property
    def act(self) -> bool:
        """Whether the gradient of the activation has to be formed."""
        return self.pre or self.bias


class Gelu(NamedTuple):
    """The activation and its way back, on rows in memory of their own.

    Args:
        approximate: "none" or "tanh".
        fused: by the kernels, rather than PyTorch's passes.
    """

    approximate: Approximate
    fused: bool

    def forward(self, pre: Tensor, bias: Tensor | None, spend: bool = False) -> Tensor:
        """gelu(pre + bias), (R, H); with `spend` it may take the memory of pre, which is contiguous."""
        if self.fused:
            pre = pre.contiguous()
            act = pre if spend else torch.empty_like(pre)
            kernels.forward(pre, bias, self.approximate, act)
            return act
        x = reference.with_bias(pre, bias)
        if not spend and bias is None:
            return F.gelu(x, approximate=self.approximate)
        torch.ops.aten.gelu_(x, approximate=self.approximate)  # x is nobody else's
        return x.to(pre.dtype)

    def backward(
        self, grad: Tensor, pre: Tensor, bias: Tensor | None, weight: Tensor, needs: Needs,
        total: Tensor | None = None, spend: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients by pre, in new memory, by the bias, in fp32 or better, and by the weight, (E, H).

        Beside pre there are at most two tensors of its size at a time, one with `spend`.

        Args:
            grad: (R, E) of the output.
            total: takes the weight's gradient on top, in its own dtype; None makes a new one.
            spend: whether the memory of pre, which is contiguous, may be overwritten.
        """
        return (self._fused if self.fused else self._passes)(grad, pre, bias, weight, needs, total, spend)

    def _fused(
        self, grad: Tensor, pre: Tensor, bias: Tensor | None, weight: Tensor, needs: Needs,
        total: Tensor | None, spend: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        pre = pre.contiguous()
        act = grad_pre = grad_bias = None
        if needs.act:
            grad_pre = grad @ weight
            act = None if not needs.weight else pre if spend else torch.empty_like(pre)
            grad_bias = kernels.backward(grad_pre, pre, bias, self.approximate, act, needs.bias)
        elif needs.weight:
            act = self.forward(pre, bias, spend)
        return grad_pre, grad_bias, None if act is None else add_product(total, grad.t(), act)

    def _passes(
        self, grad: Tensor, pre: Tensor, bias: Tensor | None, weight: Tensor, needs: Needs,
        total: Tensor | None, spend: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        x = reference.with_bias(pre, bias)
        grad_weight = None
        if needs.weight:  # first, so that the activation is gone before its gradient comes
            act = F.gelu(x, approximate=self.approximate).to(pre.dtype)
            grad_weight = add_product(total, grad.t(), act)
            del act
        if not needs.act:
            return None, None, grad_weight
        grad_pre = (grad @ weight).to(x.dtype)
        torch.ops.aten.gelu_backward.grad_input(
            grad_pre, x, approximate=self.approximate, grad_input=grad_pre
        )
        grad_bias = sum_rows(grad_pre, x.dtype) if needs.bias else None
        return grad_pre.to(pre.dtype), grad_bias, grad_weight


def _forward_op(
    pre: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None,
    approximate: Approximate, fused: bool,
) -> Tensor:  # fmt: skip
    act = Gelu(approximate, fused).forward(as_rows(pre), bias)
    return linear(act, weight, out_bias).view(*pre.shape[:-1], weight.shape[0])


def _backward_op(
    grad: Tensor, pre: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None,
    approximate: Approximate, fused: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    grad = as_rows(grad)
    grads = Gelu(approximate, fused).backward(
        grad, as_rows(pre), bias, weight.to(pre.dtype), Needs(*needs[:3])
    )
    grad_out_bias = sum_rows(grad, out_bias.dtype) if out_bias is not None and needs[3] else None
    return in_shape([*grads, grad_out_bias], [pre, bias, weight, out_bias], needs)


def _forward_flops(pre: Any, bias: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(pre) * weight[0])


def _backward_flops(grad: Any, pre: Any, *rest: Any, **_: Any) -> int:
    needs = Needs(*rest[-1][:3])
    return int((needs.act + needs.weight) * 2 * math.prod(pre) * grad[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.how = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    return *of_asked(_backward(grad, *ctx.saved_tensors, *ctx.how, needs), needs), None, None


def _shape(pre: Tensor, bias: Tensor | None, weight: Tensor, *_: object) -> tuple[int, ...]:
    return *pre.shape[:-1], weight.shape[0]


_INPUTS = "Tensor pre, Tensor? bias, Tensor weight, Tensor? out_bias, str approximate, bool fused"

_backward = Operator(
    f"dtrain::gelu_linear_backward(Tensor grad, {_INPUTS}, bool[] needs)"
    " -> (Tensor grad_pre, Tensor grad_bias, Tensor grad_weight, Tensor grad_out_bias)",
    cpu=_backward_op,
    cuda=_backward_op,
    fake=lambda grad, *args: empty_grads(args[:4], args[-1]),
    flops=_backward_flops,
)
gelu_linear_op = Operator(
    f"dtrain::gelu_linear({_INPUTS}) -> Tensor",
    cpu=_forward_op,
    cuda=_forward_op,
    fake=lambda *args: args[0].new_empty(_shape(*args)),
    flops=_forward_flops,
    save=_save,
    backward=_differentiate,
    shape=_shape,
)


def gelu_linear(
    pre: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    out_bias: Tensor | None = None,
    *,
    approximate: Approximate = "none",
    backend: Backend = "auto",
) -> Tensor:
    """linear(gelu(pre + bias), weight, out_bias), differentiable; for its backward pass it keeps pre alone.

    The bias is added in fp32 or better and the activation rounded once, to pre's dtype. Dtypes are those of
    F.linear, under autocast too, except that biases may be wider.

    Args:
        pre: (..., H), any strides.
        bias: (H,), in pre's dtype or a wider one, or None.
        weight: (E, H).
        out_bias: (E,), as `bias`.
        approximate: "none" is the exact GELU, "tanh" its approximation.
        backend: "triton" has GELU by kernels, for fp16, bf16 and fp32; "auto" has them on a GPU and PyTorch's
            own passes on a CPU. "reference" is plain PyTorch, which keeps the activation too.
    Returns: (..., E).
    Raises:
        ValueError: shapes or dtypes do not fit, or the chosen backend cannot serve.
    """
    check_layer(pre.shape[-1], weight, out_bias, ("weight", "out_bias"))
    if bias is not None and bias.shape != pre.shape[-1:]:
        raise ValueError(f"bias {tuple(bias.shape)}: must be ({pre.shape[-1]},), the width of pre")
    (pre,) = compute_dtype({"pre": pre}, {"weight": weight}, {"bias": bias, "out_bias": out_bias})
    path = serving(backend, approximate, pre.device, pre.dtype)
    if path == "reference":
        return reference.gelu_linear(pre, bias, weight, out_bias, approximate)
    out: Tensor = gelu_linear_op(pre, bias, weight, out_bias, approximate, path == "kernels")
    return out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def serving(backend: Backend, approximate: Approximate, device: torch.device, dtype: torch.dtype) -> Path:
    """Who computes: plain PyTorch, or the operator with the kernels' passes or with PyTorch's.

    Raises:
        ValueError: the chosen backend cannot serve, or an option is not known.
    """
    # Asked while torch.compile traces, which cannot see through the log and the cache.
    if approximate not in get_args(Approximate):
        raise ValueError(f"approximate = {approximate!r}: must be one of 'none', 'tanh'")
    refusal = kernels.refusal(device, dtype)
    if kernels_serve(backend, device, refusal, "GELU and its gradient take several passes"):
        return "kernels"
    operator = backend == "auto" and device.type in ("cpu", "cuda", "meta")
    return "passes" if operator else "reference"
