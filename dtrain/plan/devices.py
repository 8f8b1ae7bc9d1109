"""GPUs that can be planned for: memory, bandwidth, and the architecture that kernels are chosen by.

Memory as the driver reports it (`nvidia-smi`), bandwidth from NVIDIA's data sheets; FLOP/s:
`dtrain.metrics.flops`.
"""

from dataclasses import dataclass

__all__ = ["DEVICES", "Planned", "device"]

_MIB = 2**20


@dataclass(frozen=True)
class Planned:
    """A GPU.

    Attributes:
        name: as CUDA gives it.
        arch: of kernels.
        memory_bytes: all that a process may have, its context included.
        bytes_per_s: of its memory.
    """

    name: str
    arch: str
    memory_bytes: int
    bytes_per_s: float


DEVICES = {
    "a100": Planned("NVIDIA A100-SXM4-80GB", "sm_80", 81_920 * _MIB, 2.039e12),
    "l40s": Planned("NVIDIA L40S", "sm_89", 46_068 * _MIB, 0.864e12),
    "h100": Planned("NVIDIA H100 80GB HBM3", "sm_90", 81_559 * _MIB, 3.35e12),
    "h200": Planned("NVIDIA H200", "sm_90", 143_771 * _MIB, 4.8e12),
    "b200": Planned("NVIDIA B200", "sm_100", 183_359 * _MIB, 8.0e12),
}


def device(name: str) -> Planned:
    """A GPU by its short name.

    Raises:
        ValueError: it is not in the table.
    """
    if name not in DEVICES:
        raise ValueError(f"--device {name}: must be one of {', '.join(DEVICES)}")
    return DEVICES[name]
