"""Cases of the layer around attention, both ways: norm, qkv, QK-norm, rotation, attention, projection.

Ours against the layer written plainly around the fastest of SDPA's kernels, eager and under torch.compile.
For T tokens of width W in all, and b bytes of a (T, W):

    FLOPs = 3 · 8·T·W² + 7/2 · 4·N·T·W     bytes = 4·b and 3 times the weights: read twice, gradients written
"""

from collections.abc import Iterator
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from benchmarks.attention import contestants
from benchmarks.attention.exact import exact_attention
from benchmarks.attention.problem import Attend, Problem, Shape
from benchmarks.attention.settings import Settings, Triple
from benchmarks.baselines.plain_attention import PlainAttention
from benchmarks.case import Case, Cost, Counted, Setup, Timed
from benchmarks.sweep.compiled import compiled_module
from benchmarks.sweep.errors import TWICE_THE_BASELINE
from benchmarks.sweep.module import ModuleStep, peak
from benchmarks.sweep.plan import COMPILE, NOT_REHEARSED, OURS, LeftOut, Plan
from dtrain.kernels.reference import rope_angles
from uvit.embed import Rope
from uvit.layers import Attention

__all__ = ["layer_plans"]


class OurLayer(nn.Module):
    """`uvit.layers` before a block's MLP, on our kernels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, qk_norm=True)
        self.attn.attention_backend = "triton"

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out: Tensor = self.attn(self.norm1(x), Rope(cos, sin))
        return out


class Layer:
    """Weights and inputs of one size, and the truth about them."""

    def __init__(self, settings: Settings, shape: Shape, grid: Triple) -> None:
        self.shape, self.device, self.dtype = shape, settings.device, settings.dtype
        self.width = shape.heads * shape.head_dim
        angles = rope_angles(grid, shape.head_dim, device=self.device)
        self.cos, self.sin = angles.cos(), angles.sin()
        generator = torch.Generator().manual_seed(0)
        size = (shape.batch, shape.tokens, self.width)
        self.x, self.grad = (
            torch.randn(size, generator=generator).to(self.device, self.dtype) for _ in range(2)
        )

    def plain(self, attend: Attend) -> PlainAttention:
        """With the same weights in every call, in the settings' dtype."""
        torch.manual_seed(0)
        return PlainAttention(self.width, self.shape.heads, attend).to(self.device, self.dtype)

    def ours(self) -> OurLayer:
        module = OurLayer(self.width, self.shape.heads).to(self.device, self.dtype)
        module.load_state_dict(self.plain(exact_attention).state_dict())
        return module

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """Output and gradients in fp64, of the weights and inputs as they are rounded."""
        return self.step(self.plain(exact_attention).double(), torch.float64).results()

    def step(self, module: nn.Module, dtype: torch.dtype | None = None) -> ModuleStep:
        """One pass of `module` both ways, in the settings' dtype unless told."""
        angles = self.cos, self.sin
        return ModuleStep(
            module, {"input": self.x}, self.grad, angles, dtype or self.dtype, lambda: self.exact
        )


def layer_plans(settings: Settings) -> Iterator[Plan]:
    for head_dim in settings.layer_head_dims:
        for grid in settings.layer_grids:
            tokens = grid[0] * grid[1] * grid[2]
            batch = max(1, settings.batch_tokens // tokens)
            shape = Shape(batch, settings.heads[head_dim], tokens, head_dim)
            name = f"attention_layer_d{head_dim}_n{tokens}"
            yield Plan(name, _cost(settings, shape).flops, partial(_make, name, settings, shape, grid))


def _make(name: str, settings: Settings, shape: Shape, grid: Triple) -> tuple[Case, list[LeftOut]]:
    layer = Layer(settings, shape, grid)
    best, reasons = contestants.fastest_sdpa(settings, shape)
    attend = contestants.sdpa(contestants.SDPA[best])
    setups: dict[str, Setup] = {"eager, best SDPA": lambda: layer.step(layer.plain(attend))}
    refused = contestants.refusal(contestants.ours(), Problem(shape, settings.device, settings.dtype))
    if refused:
        reasons = {**reasons, OURS: refused}
    else:
        setups[OURS] = lambda: layer.step(layer.ours())
    if settings.kind == "cuda":
        setups[f"{COMPILE}, best SDPA"] = lambda: layer.step(compiled_module(layer.plain(attend)))
        if not refused:
            setups[f"{OURS}, {COMPILE}"] = lambda: layer.step(compiled_module(layer.ours()))
    else:
        reasons = {**reasons, COMPILE: NOT_REHEARSED}
    case = _case(name, settings, shape, best, setups)
    return case, [LeftOut(name, label, reason) for label, reason in reasons.items()]


def _cost(settings: Settings, shape: Shape) -> Cost:
    tokens, width = shape.batch * shape.tokens, shape.heads * shape.head_dim
    flops = 3 * 8 * tokens * width**2 + shape.flops() * 7 // 2
    size = settings.dtype.itemsize
    moved = 4 * tokens * width * size + 3 * 4 * width**2 * size
    reason = "4 products and attention, 3 and 7/2 forwards; input, output, their gradients, weights"
    return Cost(flops, moved, reason, settings.dtype_name)


def _case(name: str, settings: Settings, shape: Shape, best: str, setups: dict[str, Setup]) -> Case:
    return Case(
        name=name,
        title=f"Attention layer both ways, {shape.batch} × {shape.tokens:,} tokens, {shape.heads} heads × "
        f"{shape.head_dim}, best SDPA: {best}",
        baseline="eager, best SDPA",
        contestants=setups,
        gates=(TWICE_THE_BASELINE,),
        metrics=(Timed("call_ms"), Counted("peak_bytes", "bytes", peak)),
        cost=_cost(settings, shape),
        device=settings.kind,
        rounds=settings.rounds,
        warmup=settings.warmup,
        cold=True,
    )
