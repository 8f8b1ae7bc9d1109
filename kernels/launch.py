"""Triton where it is installed, the GPUs that kernels are made for, and what to compile for them.

Kernel files write `from dtrain.kernels.launch import tl, triton`, so that they import without Triton too.
Their `aot_cases()` say what `dtrain.kernels.aot` compiles for GPUs that are not there.
"""

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "HAS_TRITON", "triton", "tl", "can_launch", "on_gpu",
    "SHARED_BYTES", "arch_of", "known_arch", "planned_for",
    "AotCase",
]  # fmt: skip


class _Absent:
    """Stands where Triton would: kernels can be defined with it, not launched."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # its wheels are for Linux only
    triton = tl = _Absent()
    HAS_TRITON = False

_log = logging.getLogger(__name__)

# Shared memory that one block may ask for. Sources: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability", less the 1 KiB that CUDA keeps for itself; AMD CDNA 3 ISA guide (local data share).
SHARED_BYTES = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}


_planned: ContextVar[str] = ContextVar("_planned", default="")


@contextmanager
def planned_for(arch: str) -> Iterator[None]:
    """Meanwhile choose as on a GPU of that architecture, for tensors without data; launches do nothing."""
    token = _planned.set(arch)
    launch = triton.runtime.jit.JITFunction.run if HAS_TRITON else None
    if HAS_TRITON:
        triton.runtime.jit.JITFunction.run = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        _planned.reset(token)
        if HAS_TRITON:
            triton.runtime.jit.JITFunction.run = launch


def on_gpu(device: torch.device) -> bool:
    """Whether tensors of `device` are on a GPU, or planned for one."""
    return device.type == "cuda" or bool(_planned.get())


def can_launch(device: torch.device) -> bool:
    """Whether Triton runs kernels on tensors of `device`: on a GPU, or on the CPU in Triton's interpreter."""
    interpreted = device.type == "cpu" and HAS_TRITON and bool(triton.knobs.runtime.interpret)
    return interpreted or (on_gpu(device) and HAS_TRITON)


def arch_of(device: torch.device) -> str:
    """Architecture of a GPU, such as "sm_90"; the interpreter, on the CPU, borrows the tiles of "sm_80"."""
    if device.type == "cpu":
        return _planned.get() or "sm_80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def known_arch(arch: str) -> str:
    """`arch` itself where `SHARED_BYTES` has it, else the nearest older one of its family, said once.

    Raises:
        ValueError: there is none.
    """
    family, number = _generation(arch)
    older = [a for a in SHARED_BYTES if _generation(a) <= (family, number) and _generation(a)[0] == family]
    if not older:
        raise ValueError(f"arch = {arch}: no kernel is made for it; known are {', '.join(SHARED_BYTES)}")
    nearest = max(older, key=_generation)
    if nearest != arch:
        _log.warning("%s has no launch parameters of its own: its kernels use those of %s", arch, nearest)
    return nearest


def _generation(arch: str) -> tuple[str, int]:
    """("sm_", 90), ("gfx", 0x942): compute capabilities are decimal, AMD's targets hexadecimal."""
    if arch.startswith("sm_"):
        return "sm_", int(arch.removeprefix("sm_"))
    return "gfx", int(arch.removeprefix("gfx"), 16)


@dataclass(frozen=True)
class AotCase:
    """One kernel with one set of launch parameters, to be compiled for a GPU that need not be there.

    Args:
        name: unique on its architecture, such as "attention.forward D=72 bf16".
        kernel: the function that `triton.jit` made.
        arch: a key of `SHARED_BYTES`.
        signature: type of every argument that is not a constexpr: "*bf16", "i32", "i64", "fp32".
        constexprs: value of every constexpr. A stride of one belongs here, as Triton itself puts it.
        divisible: arguments, pointers and integers, that are multiples of 16: they allow 16-byte loads.
        options: how it is launched: num_warps, num_stages and what else Triton takes.
        max_spills: spill stores that pass.
        tensor_cores: whether the kernel multiplies matrices.
    """

    name: str
    kernel: Any
    arch: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...]
    options: Mapping[str, Any]
    max_spills: int = 0
    tensor_cores: bool = True
