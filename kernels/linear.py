"""What operators with linear layers inside share: dtypes, products, sums, gradients that nobody asks for.

Such an operator computes in the dtype of its activations. Under autocast it casts the parameters itself, both
ways, so that no copy of a parameter is kept for the backward pass.

Shapes: R rows, W any width.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.kernels.attention import as_autocast
from dtrain.kernels.qk_norm_rope import or_nothing

__all__ = [
    "check_layer", "compute_dtype",
    "add_product", "as_rows", "linear", "sum_rows",
    "empty_grads", "in_shape", "of_asked",
]  # fmt: skip


def check_layer(width: int, weight: Tensor, bias: Tensor | None, names: tuple[str, str]) -> None:
    """Raise ValueError where weight (E, `width`) or bias (E,), called by their names, do not fit."""
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{names[0]} {tuple(weight.shape)}: must be (E, {width}), a column for each input")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{names[1]} {tuple(bias.shape)}: must be ({weight.shape[0]},), one for each output of {names[0]}"
        )


def compute_dtype(
    activations: Mapping[str, Tensor], weights: Mapping[str, Tensor], biases: Mapping[str, Tensor | None]
) -> list[Tensor]:
    """The activations, cast under autocast, once all dtypes are known to go together.

    Args:
        activations, weights, biases: by the names that an error calls them. The first activation decides.
    Raises:
        ValueError: dtypes differ outside autocast, biases aside, which may be wider.
    """
    cast = list(activations.values())
    device = cast[0].device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast:
        cast = [as_autocast(x) for x in cast]
    dtype = cast[0].dtype
    for name, x in zip(activations, cast, strict=True):
        if x.dtype != dtype:
            raise _mixed(name, x, activations, dtype, "must be one")
    for name, weight in weights.items():
        if weight.dtype != dtype and not (autocast and torch.float64 not in (weight.dtype, dtype)):
            raise _mixed(name, weight, activations, dtype, "must be one, or use torch.autocast")
    for name, bias in biases.items():
        if bias is None or bias.dtype == dtype or autocast:
            continue
        if torch.promote_types(bias.dtype, dtype) != bias.dtype:
            raise _mixed(name, bias, activations, dtype, "must be that or wider")
    return cast


def _mixed(name: str, x: Tensor, activations: Iterable[str], dtype: torch.dtype, rule: str) -> ValueError:
    return ValueError(f"{name} has dtype {x.dtype}, {next(iter(activations))} {dtype}: {rule}")


def as_rows(x: Tensor) -> Tensor:
    """(..., W) as (R, W); a view where the strides allow it."""
    return x.reshape(-1, x.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a·b in place of total and in its dtype; a·b without one."""
    if total is None:
        return a @ b
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    return total.add_(a @ b)


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over the rows of (R, W), added in fp32 or better; (W,) in `dtype`."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, dtype)).to(dtype)


def in_shape(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients in their inputs' shapes and dtypes; tensors without elements where none is asked for."""
    like = next(x for x in inputs if x is not None)
    return tuple(
        or_nothing(None if x is None or grad is None or not need else grad.view(x.shape).to(x.dtype), like)
        for grad, x, need in zip(grads, inputs, needs, strict=True)
    )


def empty_grads(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What `in_shape` gives, without values."""
    return in_shape([None if x is None else x.new_empty(x.shape) for x in inputs], inputs, needs)


def of_asked(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """What `in_shape` gives, None where none is asked for, as autograd takes it."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]
