"""Cases of the norm, alone, behind a residual sum, and behind a gated one and before a modulation (adaLN).

Bound by memory: `kernels.norm` counts the bytes. PyTorch's parts are what one writes; each is a pass or two.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Cost
from benchmarks.fused import liger
from benchmarks.fused.liger import with_liger
from benchmarks.fused.settings import Settings, Size
from benchmarks.sweep.contest import Rivals
from benchmarks.sweep.draw import draws
from benchmarks.sweep.op import Op, op_plans
from benchmarks.sweep.plan import Plan
from dtrain.kernels import norm as kernels

__all__ = ["norm_ops", "norm_plans"]

_EPS = 1e-6


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, _EPS)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, _EPS)


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, layer_norm(total, weight, bias)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, rms_norm(total, weight)


def adaln(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """gate, scale, shift: (B, D)."""
    total = x + gate[:, None] * branch
    normed = F.layer_norm(total, total.shape[-1:], eps=_EPS)
    return total, normed * (1 + scale[:, None]) + shift[:, None]


def our_adaln(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
    return kernels.add_norm(x, branch, gate=gate, scale=scale, shift=shift, eps=_EPS, backend="triton")


_norm = partial(kernels.norm, eps=_EPS, backend="triton")
_add_norm = partial(kernels.add_norm, eps=_EPS, backend="triton")


def norm_plans(settings: Settings) -> Iterator[Plan]:
    for op in norm_ops(settings):
        yield from op_plans(settings, op)


def norm_ops(settings: Settings) -> Iterator[Op]:
    """The norms of both sizes, and the residual sums before them."""
    for size in (settings.images, settings.video):
        yield _op(
            settings, size, "layer", with_liger(layer_norm, _norm, partial(liger.layer_norm, eps=_EPS)),
            affine=2, add=False,
        )  # fmt: skip
        yield _op(settings, size, "add_layer", Rivals(add_layer_norm, _add_norm), affine=2)
    rms = partial(_norm, kind="rms")
    add_rms = partial(_add_norm, kind="rms")
    yield _op(
        settings, settings.video, "rms", with_liger(rms_norm, rms, partial(liger.rms_norm, eps=_EPS)),
        affine=1, add=False, kind="rms",
    )  # fmt: skip
    if not settings.quick:
        theirs = partial(liger.add_rms_norm, eps=_EPS)
        yield _op(
            settings, settings.video, "add_rms", with_liger(add_rms_norm, add_rms, theirs),
            affine=1, kind="rms",
        )  # fmt: skip
    samples = settings.images.samples
    yield _op(
        settings, settings.images, "adaln", Rivals(adaln, our_adaln),
        affine=0, gated=samples, modulated=samples,
    )  # fmt: skip


def _op(
    settings: Settings, size: Size, name: str, rivals: Rivals, *, affine: int, add: bool = True, **how: Any
) -> Op:
    """`how`: as for `kernels.norm.forward_bytes`."""

    def cost(count: Callable[..., int]) -> Cost:
        item = settings.dtype.itemsize
        moved = count(size.rows, size.width, item, item, add=add, affine=affine, **how)
        tensors = moved // (size.rows * size.width * item)
        return Cost(0, moved, f"{tensors} tensors of x's size, what rows and samples have of their own")

    return Op(
        name=("norm", f"{name}_{size.label}"),
        title=f"{_TITLES[name]}, {size.words}",
        rivals=rivals,
        draw=partial(_draw, settings, size, add, affine, 3 if how.get("gated") else 0),
        cost={"forward": cost(kernels.forward_bytes), "backward": cost(kernels.backward_bytes)},
    )


_TITLES = {
    "layer": "LayerNorm",
    "rms": "RMSNorm",
    "add_layer": "Residual sum and LayerNorm",
    "add_rms": "Residual sum and RMSNorm",
    "adaln": "Gated residual sum, LayerNorm and modulation",
}


def _draw(
    settings: Settings, size: Size, add: bool, affine: int, vectors: int
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """x, the branch, weight, bias, vectors of samples; gradients of the sum and of what is normed."""
    draw = draws(settings)
    count = 2 if add else 1
    wide = [draw(size.samples, size.tokens, size.width) for _ in range(2 * count)]
    own = [draw(size.width) for _ in range(affine)] + [draw(size.samples, size.width) for _ in range(vectors)]
    return [*wide[:count], *own], wide[count:]
