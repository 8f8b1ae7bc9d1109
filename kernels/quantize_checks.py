"""What the functions of `quantize` refuse, each by its name, with its value and what it must be."""

import torch
from torch import Tensor

from dtrain.kernels.payload import ALIGNMENT, Format, payload_bytes, residual_numel

__all__ = [
    "DTYPES", "check_divide", "check_payload", "check_payloads", "check_residual", "check_stream",
    "check_tensor", "lead_of",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def lead_of(name: str, x: Tensor) -> tuple[int, ...]:
    """(m,) of m rows, () of a tensor with one dimension."""
    if x.dim() not in (1, 2):
        raise ValueError(f"{name} {tuple(x.shape)}: must be (n,), or (m, n) for m rows")
    return tuple(x.shape[:-1])


def check_tensor(
    name: str, x: Tensor, shape: tuple[int, ...], device: torch.device,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:  # fmt: skip
    """That it is contiguous and of a shape, one of some dtypes, and on a device."""
    if x.shape != shape or not x.is_contiguous():
        contiguous = "" if x.is_contiguous() else " and not contiguous"
        raise ValueError(f"{name} {tuple(x.shape)}{contiguous}: must be contiguous {shape}")
    _check_kind(name, x, device, dtypes)


def _check_kind(name: str, x: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}: must be one of {', '.join(map(str, dtypes))}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}: must be on {device} as the others are")


def check_payload(
    name: str, payload: Tensor, lead: tuple[int, ...], n: int, format: Format, device: torch.device
) -> None:
    """That it is a payload of n elements, or one for each row."""
    shape = (*lead, payload_bytes(n, format))
    if payload.shape != shape:
        raise ValueError(f"{name} {tuple(payload.shape)}: must be {shape}")
    _check_apart(name, payload)
    _check_kind(name, payload, device, (torch.uint8,))


def check_payloads(payloads: Tensor, n: int, format: Format) -> tuple[int, ...]:
    """That they are (k, bytes), or (k, m, bytes) for m rows; returns () or (m,)."""
    size = payload_bytes(n, format)
    if payloads.dim() not in (2, 3) or len(payloads) < 1 or payloads.shape[-1] != size:
        raise ValueError(
            f"payloads {tuple(payloads.shape)}: must be (k, {size}) or (k, m, {size}), k at least 1"
        )
    _check_apart("payloads", payloads)
    _check_kind("payloads", payloads, payloads.device, (torch.uint8,))
    return tuple(payloads.shape[1:-1])


def _check_apart(name: str, payloads: Tensor) -> None:
    """That each is contiguous, and that all begin at multiples of 16 bytes if the first does."""
    *strides, within = payloads.stride()
    apart = [stride for stride, count in zip(strides, payloads.shape, strict=False) if count > 1]
    if (within != 1 and payloads.shape[-1] > 1) or any(stride % ALIGNMENT for stride in apart):
        raise ValueError(
            f"{name} has strides {payloads.stride()}: must be 1 at the end, else multiples of {ALIGNMENT}"
        )


def check_residual(
    residual: Tensor | None, lead: tuple[int, ...], n: int, format: Format, device: torch.device
) -> None:
    """That it is None, a tensor, or a payload of int8, one for each row."""
    if residual is not None and residual.dtype == torch.uint8:
        shape = (*lead, payload_bytes(n, Format("int8", format.block)))
        check_tensor("residual", residual, shape, device, (torch.uint8,))
    elif residual is not None:
        check_tensor("residual", residual, (*lead, residual_numel(n, format)), device)


def check_stream(seed: int | None, first: int, format: Format) -> None:
    """That chance has a seed, and begins with a block."""
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed = {seed}: must be in [0, 2^63)")
    if first < 0 or first % format.block:
        raise ValueError(f"first = {first}: must be a multiple of the block, {format.block}")


def check_divide(divide: float) -> None:
    """That it is above 0."""
    if not divide > 0:
        raise ValueError(f"divide = {divide}: must be above 0")
