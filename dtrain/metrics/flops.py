"""What a step costs in floating-point operations, and how much of the device's peak it reaches.

    MFU = training FLOPs of a step / (step time · devices · peak FLOP/s of one device)

A training step is counted as 3 × its forward pass: the backward pass multiplies once for the gradient of the
input and once for that of the weight. Recomputation under activation checkpointing is work, but not progress,
and is not counted (model FLOPs utilisation, Chowdhery et al., PaLM, arXiv 2204.02311, appendix B).

Peaks are the vendor's dense figures (half of those quoted "with sparsity"), fp32 accumulation.
"""

import re

import torch

TRAINING_PER_FORWARD = 3

# (pattern of the CUDA device name, TFLOP/s of bf16 = fp16 tensor cores, of TF32 tensor cores, of plain fp32).
# The first match counts. Sources: NVIDIA's data sheets of each product, and for the GeForce cards its Ampere
# GA102, Ada and RTX Blackwell architecture white papers (appendix A of each).
_PEAK_TFLOPS: tuple[tuple[str, float, float, float], ...] = (
    (r"\bGB200\b|\bGB300\b", 2500.0, 1250.0, 80.0),
    (r"\bB200\b|\bB300\b", 2250.0, 1125.0, 75.0),
    (r"\bH200 NVL\b|\bH100 NVL\b", 835.5, 417.5, 60.0),
    (r"\bH100 PCIe\b", 756.5, 378.0, 51.0),
    (r"\bH100\b|\bH200\b|\bH800\b|\bGH200\b", 989.5, 494.7, 67.0),
    (r"\bH20\b", 148.0, 74.0, 44.0),
    (r"\bA100\b|\bA800\b", 312.0, 156.0, 19.5),
    (r"\bA30\b", 165.0, 82.0, 10.3),
    (r"\bA40\b", 149.7, 74.8, 37.4),
    (r"\bA10\b", 125.0, 62.5, 31.2),
    (r"\bL40S\b", 362.0, 183.0, 91.6),
    (r"\bL40\b", 181.0, 90.5, 90.5),
    (r"\bL4\b", 121.0, 60.0, 30.3),
    (r"\bRTX 6000 Ada\b", 364.2, 182.1, 91.1),
    (r"\bRTX A6000\b", 154.8, 77.4, 38.7),
    (r"\bRTX 5090\b", 209.5, 104.8, 104.8),
    (r"\bRTX 4090\b", 165.2, 82.6, 82.6),
    (r"\bRTX 3090\b", 71.0, 35.6, 35.6),
)
# Cards that share a listed name but not its clocks or its number of cores.
_OTHER_CARDS = re.compile(r"\bMIG\b|Laptop|Max-Q|\b4090 D\b|\b5090 D\b|\b3090 Ti\b", re.IGNORECASE)


def training_flops(forward_flops: int) -> int:
    """FLOPs of forward and backward together, recomputation not counted."""
    return TRAINING_PER_FORWARD * forward_flops


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak dense FLOP/s of a device for matrix products of `dtype`; None when it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it; "cpu" and unlisted names have no known peak.
        dtype: of the operands. fp32 counts as TF32 when `torch.set_float32_matmul_precision` lets it run so.
    """
    if _OTHER_CARDS.search(device_name):
        return None
    for pattern, half, tf32, fp32 in _PEAK_TFLOPS:
        if re.search(pattern, device_name):
            single = tf32 if torch.get_float32_matmul_precision() != "highest" else fp32
            peaks = {torch.bfloat16: half, torch.float16: half, torch.float32: single}
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def mfu(work: float | None, seconds: float, devices: int, peak: float | None) -> float | None:
    """Share of the devices' peak that was put to use, in [0, 1].

    Args:
        work: training FLOPs done by all devices together.
        seconds: in which they were done.
        devices: their number.
        peak: FLOP/s of one device.

    Returns:
        None when the work or the peak is not known.
    """
    return None if work is None or peak is None else work / (seconds * devices * peak)
