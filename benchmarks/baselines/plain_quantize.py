"""Block-scaled quantisation the way one writes it: a tensor operation after the other, all elements at once.

    v = H(x) + residual      s = max|v| / largest of a block, rounded up to bf16      c = round(v / s)

Formats and payloads are those of `dtrain.kernels.payload`, for finite numbers. torch.compile takes all of it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.kernels.payload import Format, payload_bytes
from dtrain.kernels.quantize_reference import TINY
from dtrain.kernels.rounding import words


def encode(x: Tensor, format: Format, residual: Tensor | None = None, seed: int | None = None) -> Tensor:
    """The payload of x (n,); `residual` (n,) fp32 is added, and replaced by the new error."""
    v = _rotated(_padded(x.float(), format.block), format.rotation).view(-1, format.block)
    if residual is not None:
        v = v + _padded(residual, format.block).view_as(v)
    largest = v.abs().amax(1, keepdim=True)
    scale = ((largest * (1 / format.largest)).view(torch.int32) + 0xFFFF & -0x10000).view(torch.float32)
    scale = torch.where(largest < TINY, 1.0, scale)
    noise = None if seed is None else words(seed, 0, v.numel(), v.device).view_as(v)
    codes = _codes(v * (1 / scale), format, noise)
    if residual is not None:
        residual.copy_((v - codes.float() * scale).flatten()[: residual.numel()])
    scales = scale.bfloat16().view(torch.uint8).flatten()
    payload = torch.cat([_packed(codes, format).flatten(), scales])
    return F.pad(payload, (0, payload_bytes(x.numel(), format) - payload.numel()))


def decode(payload: Tensor, n: int, format: Format) -> Tensor:
    """What a payload stands for, (n,) fp32."""
    blocks = format.blocks(n)
    codes, scales, _ = payload.split(
        [
            blocks * format.code_bytes,
            2 * blocks,
            payload.numel() - blocks * (format.code_bytes + 2),
        ]
    )
    scale = scales.view(torch.bfloat16).float()[:, None]
    v = _unpacked(codes.view(blocks, -1), format) * scale
    return _rotated(v.flatten(), format.rotation)[:n]


def decode_sum(payloads: Tensor, n: int, format: Format) -> Tensor:
    total = decode(payloads[0], n, format)
    for payload in payloads[1:]:
        total = total + decode(payload, n, format)
    return total


def decode_add(payload: Tensor, n: int, format: Format, into: Tensor) -> Tensor:
    return into.add_(decode(payload, n, format))


def _padded(x: Tensor, block: int) -> Tensor:
    return F.pad(x, (0, -x.numel() % block))


def _rotated(x: Tensor, order: int) -> Tensor:
    """The orthonormal Hadamard transform of consecutive groups."""
    if not order:
        return x
    h = torch.ones(1, 1, device=x.device)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return (x.view(-1, order) @ h).flatten() * math.pow(order, -0.5)


def _codes(t: Tensor, format: Format, noise: Tensor | None) -> Tensor:
    """Numbers that are codes: int8, or e4m3."""
    if format.bits == "fp8":
        return t.to(torch.float8_e4m3fn)
    if noise is None:
        return t.round().to(torch.int8)
    fixed = (t * 2.0**23).to(torch.int32) + (noise >> 9).to(torch.int32)  # in units of 2^-23
    return (fixed >> 23).clamp(-format.largest, format.largest).to(torch.int8)


def _packed(codes: Tensor, format: Format) -> Tensor:
    if format.bits != "int4":
        return codes.view(torch.uint8)
    first, second = (codes + 8).view(torch.uint8).chunk(2, dim=1)
    return first | (second << 4)


def _unpacked(codes: Tensor, format: Format) -> Tensor:
    if format.bits == "fp8":
        return codes.view(torch.float8_e4m3fn).float()
    if format.bits == "int8":
        return codes.view(torch.int8).float()
    return torch.cat([codes & 15, codes >> 4], dim=1).float() - 8
