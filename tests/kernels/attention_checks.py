"""What the tests of attention share: inputs, the kernels in each of their forms, and the fp64 truth."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor

from dtrain.kernels import attention_backward, attention_forward, reference
from dtrain.kernels.attention import attention
from dtrain.kernels.block_mask import BlockMask
from dtrain.kernels.launch import can_launch
from dtrain.kernels.tiles import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Error over norm. fp16 rounds the probabilities to 2^-11, fp32 sums in another order.
BOUND = {torch.float16: 6e-4, torch.float32: 2e-6}
NAMES = ("out", "lse", "dq", "dk", "dv")

needs_triton = pytest.mark.skipif(
    not can_launch(DEVICE), reason="the kernels need a GPU, or TRITON_INTERPRET=1 in the environment"
)
triton = functools.partial(attention, backend="triton")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def draw_qkv(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype = torch.float32, heads: int = 2
) -> list[Tensor]:
    return [draw(1, heads, n, head_dim, seed=s, dtype=dtype) for s, n in enumerate((queries, keys, keys))]


def draw_grads(q: Tensor) -> tuple[Tensor, Tensor]:
    return draw(*q.shape, seed=7, dtype=q.dtype), draw(*q.shape[:3], seed=8)


def evaluate(function, qkv: list[Tensor], grads: tuple[Tensor, ...], **options) -> tuple[Tensor, ...]:
    """What the function gives, out or out and lse, then dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    outputs = function(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels launched one by one, in one of their forms."""

    form: attention_backward.Form = "split"
    tile: Tile | None = None

    def __call__(
        self,
        qkv: list[Tensor],
        grads: tuple[Tensor, Tensor],
        scale: float | None = None,
        mask: BlockMask | None = None,
    ) -> tuple[Tensor, ...]:
        """out, lse, dq, dk, dv."""
        scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale
        out, lse = attention_forward.forward(*qkv, scale, mask, self.tile)
        tiles = {p.name: self.tile for p in attention_backward.PASSES} if self.tile else None
        gradients = attention_backward.backward(*grads, *qkv, out, lse, scale, mask, self.form, tiles=tiles)
        return out, lse, *gradients


SPLIT, FUSED = Kernels("split"), Kernels("fused")
# Triton's interpreter reads by descriptors, but does not add by them.
DESCRIPTORS = Kernels("split", Tile(32, 64, 4, 2, tma=True))
SMALL = Kernels("fused", Tile(16, 32, 4, 2))


def exact(
    qkv: list[Tensor], grads: tuple[Tensor, Tensor], scale: float | None, mask: BlockMask | None
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv in fp64, by autograd; the lse of a query without keys is a constant."""
    wide, (grad_out, grad_lse) = [x.double() for x in qkv], (g.double() for g in grads)
    seen = None if mask is None else mask.dense()
    if seen is not None:
        grad_lse = grad_lse.masked_fill(~seen.any(1), 0.0)
    return evaluate(reference.attention_with_lse, wide, (grad_out, grad_lse), scale=scale, mask_MN=seen)


def assert_exact(
    ours: tuple[Tensor, ...],
    qkv: list[Tensor],
    grads: tuple[Tensor, Tensor],
    scale: float | None = None,
    mask: BlockMask | None = None,
) -> None:
    """out, lse and gradients agree with fp64 as far as the dtype reaches, and in dtype."""
    truths = exact(qkv, grads, scale, mask)
    for name, mine, truth in zip(NAMES, ours, truths, strict=True):
        assert mine.dtype == (torch.float32 if name == "lse" else qkv[0].dtype)
        assert mine.isinf().equal(truth.isinf()), name
        difference = (mine.double() - truth).masked_fill(truth.isinf(), 0.0)
        error = difference.norm() / truth.masked_fill(truth.isinf(), 0.0).norm().clamp(min=1e-30)
        assert error < BOUND[qkv[0].dtype], f"{name}: {error:.1e}"


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert [a.equal(b) for a, b in zip(ours, theirs, strict=True)] == [True] * len(theirs)


def poison(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Make the kernels write into NaNs, with NaNs behind; returns the buffers, which fill as they run."""
    buffers: list[Tensor] = []

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        buffers.append(torch.full((size + MARGIN,), math.nan, dtype=dtype, device=DEVICE))
        return buffers[-1][:size].view(shape)

    def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return poisoned((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), dtype or x.dtype).transpose(1, 2)

    for module in (attention_forward, attention_backward):
        monkeypatch.setattr(module, "empty_like", empty_like)
        monkeypatch.setattr(module, "empty_lse", lambda q: poisoned(q.shape[:3], torch.float32))
    return buffers


MARGIN = 512 * 128
