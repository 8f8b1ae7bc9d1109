"""Cases of a whole block of U-ViT, both ways: ours against the block written plainly, eager and compiled.

All have the same attention, the fastest of SDPA's kernels there, so that what differs is the rest. For T
tokens of width W in all, N of a sample, and b bytes of a (T, W):

    FLOPs = 3 · 24·T·W² + 7/2 · 4·N·T·W, with a skip 3 · 4·T·W² more
    bytes = 4·b, with a skip 6·b, and 3 times the weights
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attention.contestants import SDPA, fastest_sdpa, sdpa
from benchmarks.attention.exact import exact_attention
from benchmarks.attention.problem import Attend, Shape
from benchmarks.baselines import plain_uvit
from benchmarks.case import Case, Cost, Setup
from benchmarks.fused.kernels import on_kernels
from benchmarks.fused.settings import Settings, Size
from benchmarks.sweep.compiled import compiled_module
from benchmarks.sweep.contest import EAGER, contest
from benchmarks.sweep.draw import draws
from benchmarks.sweep.module import ModuleStep
from benchmarks.sweep.plan import COMPILE, NOT_REHEARSED, OURS, LeftOut, Plan
from uvit.layers import Block

__all__ = ["BlockProblem", "block_plans"]


class BlockProblem:
    """Weights and inputs of one size, and the truth about them."""

    def __init__(self, settings: Settings, size: Size, skip: bool) -> None:
        self.settings, self.size, self.skip = settings, size, skip
        draw = draws(settings)
        shape = (size.samples, size.tokens, size.width)
        self.inputs = {name: draw(*shape) for name in (("x", "skip") if skip else ("x",))}
        self.grad = draw(*shape)

    def module(self, kind: Callable[..., Any], attend: Attend) -> nn.Module:
        """A block with the same weights in every call, in the settings' dtype."""
        torch.manual_seed(0)
        plain = plain_uvit.Block(self.size.width, self.size.heads, self.skip)
        module = kind(self.size.width, self.size.heads, skip=self.skip)
        module.load_state_dict(plain.state_dict())
        module.attn.attend = attend
        return on_kernels(module.to(self.settings.device, self.settings.dtype), self.settings.device)

    def step(self, module: nn.Module, dtype: torch.dtype | None = None) -> ModuleStep:
        dtype = dtype or self.settings.dtype
        return ModuleStep(module, self.inputs, self.grad, dtype=dtype, exact=lambda: self.exact)

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """Output and gradients in fp64, of the weights and inputs as they are rounded."""
        module = self.module(plain_uvit.Block, exact_attention).double()
        return self.step(module, torch.float64).results()


def block_plans(settings: Settings) -> Iterator[Plan]:
    """Both sizes, with and without a skip; in a quick run the smaller one with, the larger one without."""
    for size in (settings.images, settings.video):
        for skip in (False, True):
            if settings.quick and skip != (size is settings.images):
                continue
            name = f"block_{'skip_' if skip else ''}{size.label}"
            yield Plan(name, _cost(settings, size, skip).flops, partial(_make, name, settings, size, skip))


def _make(name: str, settings: Settings, size: Size, skip: bool) -> tuple[Case, list[LeftOut]]:
    problem = BlockProblem(settings, size, skip)
    shape = Shape(size.samples, size.heads, size.tokens, size.width // size.heads)
    best, reasons = fastest_sdpa(settings, shape)
    plain, ours = (partial(problem.module, kind, sdpa(SDPA[best])) for kind in (plain_uvit.Block, Block))
    works: dict[str, Setup] = {EAGER: lambda: problem.step(plain()), OURS: lambda: problem.step(ours())}
    if settings.kind == "cuda":
        works[COMPILE] = lambda: problem.step(compiled_module(plain()))
        works[f"{OURS}, {COMPILE}"] = lambda: problem.step(compiled_module(ours()))
    else:
        reasons = {**reasons, COMPILE: NOT_REHEARSED}
    title = f"Block{' with a skip' if skip else ''} both ways, {size.words}, {size.heads} heads, {best}"
    return contest(name, title, settings, works, reasons, _cost(settings, size, skip), queue_ms=5.0)


def _cost(settings: Settings, size: Size, skip: bool) -> Cost:
    rows, width = size.rows, size.width
    weights = (14 if skip else 12) * width**2
    flops = 3 * 2 * rows * weights + 14 * size.tokens * rows * width
    moved = ((6 if skip else 4) * rows * width + 3 * weights) * settings.dtype.itemsize
    return Cost(
        flops, moved, "products and attention, 3 and 7/2 forwards; inputs, output, gradients, weights"
    )
