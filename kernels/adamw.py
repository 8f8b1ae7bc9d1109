"""One step of AdamW over many parameters in one pass, with clipping and the weights' average along the way.

    p -= lr·wd·p        m = β1·m + (1 - β1)·g        v = β2·v + (1 - β2)·g²
    p -= lr/(1 - β1^t) · m / (√v/√(1 - β2^t) + ε)    e += w·(p - e)

on each rank's part of every parameter. Weights and averages are fp32 or bf16 rounded by chance, without a
copy in fp32; moments are fp32 or codes of eight bits, see `adamw_reference`.

The pass is bound by memory. An element costs, read and written, in fp32: p 8, g 4 (read), m 8, v 8, e 8; in
bf16 half of it, with eight bits a quarter, and two scales of 2 bytes a block of 128:

    all fp32                      28,          with an average 36
    fp32, moments of 8 bits       16 + 8/128,  with an average 24 + 8/128
    all bf16, moments of 8 bits   10 + 8/128,  with an average 14 + 8/128

The tables of the launch add 8 bytes to 8192 elements.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dtrain.kernels import adamw_kernels as kernels
from dtrain.kernels import adamw_reference as reference
from dtrain.kernels.adamw_reference import Hyper, Shard, blocks_of_row
from dtrain.kernels.serving import Backend, kernels_serve

__all__ = ["Hyper", "Shard", "adamw_", "blocks_of_row", "moments_bytes", "update_bytes"]

_FLOATS = (torch.float32, torch.bfloat16)


def moments_bytes(rows: int, row: int, coded: bool) -> int:
    """Bytes that both moments of `rows` rows of `row` elements take, scales included."""
    return 2 * rows * (row + 2 * blocks_of_row(row)) if coded else 8 * rows * row


def update_bytes(
    rows: int,
    row: int,
    *,
    param: torch.dtype = torch.float32,
    grad: torch.dtype = torch.float32,
    coded: bool = False,
    ema: torch.dtype | None = None,
) -> int:
    """Bytes that a step of `rows` rows of `row` elements moves to and from memory.

    Args:
        param, grad, ema: dtypes of parameters, gradients and averages, if any.
        coded: whether moments are codes of eight bits.
    """
    weights = 2 * param.itemsize + grad.itemsize + (0 if ema is None else 2 * ema.itemsize)
    return rows * row * weights + 2 * moments_bytes(rows, row, coded)


@torch.no_grad()
def adamw_(
    shards: Sequence[Shard],
    grads: Sequence[Tensor],
    how: Hyper,
    *,
    seed: int = 0,
    grad_scale: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Update parameters, moments and averages of one device in place.

    What is rounded by chance follows from (seed, how.step, shard.number) and an element's place in its whole
    parameter: any sharding along dim 0, without codes along any, gives the same bits, and so do the kernel
    and the reference.

    Args:
        shards: parameters and their state; empty ones are left.
        grads: of the parameters' shapes, fp32 or bf16. On the CPU they may come back multiplied by
            `grad_scale`.
        how: the same for all shards.
        seed: of the run.
        grad_scale: one fp32 number on the device that multiplies gradients, such as the coefficient of
            clipping.
        backend: "triton" is the kernel, one launch for each combination of dtypes. "reference" is its
            definition in eager PyTorch. "auto" is the kernel on a GPU; elsewhere PyTorch's own fused AdamW
            where all is fp32, which multiplies and adds in one rounding, and the reference for the rest.
    Raises:
        ValueError: a shape, dtype or layout does not fit, or the chosen backend cannot serve.
    """
    for shard, grad in zip(shards, grads, strict=True):
        check(shard, grad)
    pairs = [(s, g.contiguous()) for s, g in zip(shards, grads, strict=True) if g.numel()]
    if not pairs:
        return
    device = pairs[0][0].param.device
    if kernels_serve(backend, device, kernels.refusal(device), "AdamW takes several passes"):
        seeds = [reference.noise_seed(seed, how.step, s.number) if s.random else 0 for s, _ in pairs]
        kernels.update(pairs, reference.scalars(how), seeds, grad_scale)
        return
    plain = [pair for pair in pairs if backend == "auto" and _is_plain(*pair)]
    if plain:
        _torch_fused(plain, how, grad_scale)
    for shard, grad in pairs:
        if backend != "auto" or not _is_plain(shard, grad):
            noise = reference.noise_seed(seed, how.step, shard.number)
            reference.update(shard, grad, reference.scalars(how), seed=noise, grad_scale=grad_scale)


def _is_plain(shard: Shard, grad: Tensor) -> bool:
    return not shard.random and grad.dtype == torch.float32


def _torch_fused(pairs: Sequence[tuple[Shard, Tensor]], how: Hyper, grad_scale: Tensor | None) -> None:
    shards, grads = [s for s, _ in pairs], [g for _, g in pairs]
    if grad_scale is not None:
        torch._foreach_mul_(grads, grad_scale)
    params = [s.param for s in shards]
    step = torch.tensor(float(how.step), device=params[0].device)
    torch._fused_adamw_(
        params,
        grads,
        [s.exp_avg for s in shards],
        [s.exp_avg_sq for s in shards],
        [],
        [step] * len(shards),
        lr=how.lr,
        beta1=how.beta1,
        beta2=how.beta2,
        weight_decay=how.weight_decay,
        eps=how.eps,
        amsgrad=False,
        maximize=False,
    )
    averaged = [(s.ema, s.param) for s in shards if s.ema is not None]
    if averaged:
        torch._foreach_lerp_([e for e, _ in averaged], [p for _, p in averaged], how.ema_weight)


def check(shard: Shard, grad: Tensor) -> None:
    """Compare what is given to each other.

    Raises:
        ValueError: a shape, dtype or layout does not fit.
    """
    param = shard.param
    for name, x, dtypes in (
        ("param", param, _FLOATS),
        ("grad", grad, _FLOATS),
        ("ema", shard.ema, _FLOATS),
        ("exp_avg", shard.exp_avg, (torch.float32, torch.uint8)),
        ("exp_avg_sq", shard.exp_avg_sq, (shard.exp_avg.dtype,)),
    ):
        if x is None:
            continue
        if x.shape != param.shape:
            raise ValueError(f"{name} {tuple(x.shape)}: must have param's shape, {tuple(param.shape)}")
        if x.dtype not in dtypes:
            raise ValueError(f"{name} has dtype {x.dtype}: must be {' or '.join(map(str, dtypes))}")
        if name != "grad" and not x.is_contiguous():
            raise ValueError(f"{name} {tuple(x.shape)} with strides {x.stride()}: must be contiguous")
    if shard.coded:
        _check_scales(shard)


def _check_scales(shard: Shard) -> None:
    if shard.runs is not None:
        raise ValueError(f"codes with {shard.runs}: they need consecutive rows, from first_row on")
    shape = (shard.rows, blocks_of_row(shard.row))
    for name, x in (("exp_avg_scale", shard.exp_avg_scale), ("exp_avg_sq_scale", shard.exp_avg_sq_scale)):
        if x is None or x.shape != shape or x.dtype != torch.bfloat16 or not x.is_contiguous():
            what = "None" if x is None else f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"{name} {what}: must be contiguous {shape} torch.bfloat16, a number a block")
