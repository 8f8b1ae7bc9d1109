"""Cases of the operation alone: forward and backward apart, every head dim and length, dense and in windows.

What it must cost, with b bytes a tensor of q's shape and 4·D FLOPs a pair of query and key that is computed:

    forward    FLOPs = 4·D·pairs·B·H          bytes = 4·b: q, k, v read, out written
    backward   FLOPs = 5/2 of the forward's   bytes = 8·b: q, k, v, out, dout read, dq, dk, dv written

Both forms of our backward are contestants. The baseline is the first of SDPA's kernels that serves.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks.attention import contestants
from benchmarks.attention.problem import Attend, Backward, Forward, Problem, Shape
from benchmarks.attention.settings import Settings
from benchmarks.case import Case, Cost, Setup, Timed
from benchmarks.sweep.errors import TWICE_THE_BASELINE
from benchmarks.sweep.op import Pass
from benchmarks.sweep.plan import OURS, LeftOut, Plan
from dtrain.kernels import block_mask
from dtrain.kernels.attention_backward import Form

__all__ = ["dense_plans", "window_plans"]

_FUSED = "dtrain, fused backward"
_FLEX = "FlexAttention"


def dense_plans(settings: Settings) -> Iterator[Plan]:
    """Every head dim, length and pass of the settings."""
    for head_dim, heads in settings.heads.items():
        for tokens in settings.tokens:
            batch = max(1, settings.batch_tokens // tokens)
            yield from _plans(settings, Shape(batch, heads, tokens, head_dim), None)


def window_plans(settings: Settings) -> Iterator[Plan]:
    """A video of 3-D tiles in which every tile sees its neighbours alone: 9 pairs of 10 are left out."""
    grid, tile, window = settings.windows
    mask = block_mask.tile_windows(grid, tile, window).to(settings.device)
    for head_dim in settings.window_head_dims:
        shape = Shape(1, settings.heads[head_dim], mask.shape[0], head_dim)
        yield from _plans(settings, shape, mask)


def _plans(settings: Settings, shape: Shape, mask: block_mask.BlockMask | None) -> Iterator[Plan]:
    kind = "dense" if mask is None else "windows"
    passes: tuple[Pass, ...] = ("forward", "backward")
    for way in passes:
        name = f"attention_{kind}_{way}_d{shape.head_dim}_n{shape.tokens}"
        flops = shape.flops() * (5 if way == "backward" else 2) // 2
        yield Plan(name, flops, partial(_make, name, settings, shape, way, mask))


def _make(
    name: str, settings: Settings, shape: Shape, way: Pass, mask: block_mask.BlockMask | None
) -> tuple[Case, list[LeftOut]]:
    problem = Problem(shape, settings.device, settings.dtype)
    masked = problem if mask is None else Problem(shape, settings.device, settings.dtype, mask)
    entrants: dict[str, tuple[Problem, Attend]] = {
        **{label: (problem, contestants.sdpa(kernel)) for label, kernel in contestants.SDPA.items()},
        OURS: (masked, contestants.ours(masked.mask)),
        _FLEX: (masked, _flex(settings, mask)),
    }
    if mask is not None:
        entrants["dtrain, dense"] = problem, contestants.ours()
    reasons = {label: contestants.refusal(attend, p) for label, (p, attend) in entrants.items()}
    serving = {label: entrant for label, entrant in entrants.items() if not reasons[label]}
    left_out = [LeftOut(name, label, reason) for label, reason in reasons.items() if reason]
    return _case(name, settings, shape, way, mask, _setups(way, serving)), left_out


def _flex(settings: Settings, mask: block_mask.BlockMask | None) -> Attend:
    if mask is None:
        return contestants.flex(settings.device)
    return contestants.flex(settings.device, contestants.flex_mask(mask, settings.device))


def _setups(way: Pass, serving: Mapping[str, tuple[Problem, Attend]]) -> dict[str, Setup]:
    work: Callable[..., Any] = Forward if way == "forward" else Backward
    setups: dict[str, Setup] = {label: partial(work, *entrant) for label, entrant in serving.items()}
    if way == "backward" and OURS in serving:
        problem, attend = serving[OURS]
        setups[OURS] = partial(_our_backward, problem, attend, "split")
        setups[_FUSED] = partial(_our_backward, problem, attend, "fused")
    return setups


def _our_backward(problem: Problem, attend: Attend, form: Form) -> Backward:
    return Backward(problem, attend, contestants.our_backward(problem, form))


def _case(
    name: str,
    settings: Settings,
    shape: Shape,
    way: Pass,
    mask: block_mask.BlockMask | None,
    setups: dict[str, Setup],
) -> Case:
    forward_flops = shape.flops(None if mask is None else mask.pairs)
    flops, tensors = (forward_flops, 4) if way == "forward" else (forward_flops * 5 // 2, 8)
    density = "" if mask is None else f", {mask.density:.1%} of the pairs"
    return Case(
        name=name,
        title=f"Attention {way}, {shape.batch} × {shape.heads} heads × {shape.tokens:,} tokens × "
        f"{shape.head_dim}{density}, {settings.dtype_name}",
        baseline=next(iter(setups)),
        contestants=setups,
        gates=(TWICE_THE_BASELINE,),
        metrics=(
            Timed("call_ms"),
            Timed("throughput", "TFLOP/s", "higher", lambda seconds: flops / seconds / 1e12),
        ),
        cost=Cost(
            flops,
            tensors * shape.tensor_bytes(settings.dtype.itemsize),
            f"{'4' if way == 'forward' else '10'}·D a pair; {tensors} tensors once",
            settings.dtype_name,
        ),
        device=settings.kind,
        rounds=settings.rounds,
        warmup=settings.warmup,
        cold=True,
    )
