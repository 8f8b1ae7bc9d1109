"""Memory that PyTorch's GPU kernels take from its allocator and no operator tells of.

                          bytes                                          while
    flash backward        dQ in fp32, (B, N, H, D), and a number a row,  the operator runs
                          (B, H, N): N rounded up to 128, D to 32, or 64 above 128
    flash forward         splits of keys, (splits, B, H, N, D + 1) fp32  the operator runs, if few blocks
    cuBLAS                of each thread that multiplies: the one of     always
                          forwards and autograd's

Sources, below PyTorch's aten/src/ATen: native/transformers/cuda/flash_attn/flash_api.cpp (`mha_bwd`,
`set_params_splitkv`, `num_splits_heuristic`), native/transformers/cuda/attention_backward.cu (gradients and
outputs made contiguous), cuda/CublasHandlePool.cpp (`parseChosenWorkspaceSize`; cuBLASLt shares it).

Where PyTorch prefers cuDNN (sm_90 and sm_100), its backward accumulates the same dQ, of N and D not rounded
(cudnn-frontend, `dQ_accum`): a little less than is counted here. Not counted: what PyTorch's memory-efficient
attention takes, which serves fp32 and masks.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["cublas_bytes", "workspace_bytes"]

_aten = torch.ops.aten
_FP32_BYTES = 4
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
# Of the largest GPU of an architecture that `devices.py` has; NVIDIA's architecture whitepapers.
_MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148}
_THREADS = 2  # forward's and autograd's: a handle of cuBLAS belongs to a thread


def workspace_bytes(func: Any, args: Sequence[Any], kwargs: dict[str, Any], arch: str) -> int:
    """What a call allocates beside its results and frees before it returns, on a GPU.

    Args:
        func: overload of an operator; its tensors may be those of a CPU that stand for a GPU's.
        args, kwargs: of the call.
        arch: of the GPU, such as "sm_90".
    """
    measure = _WORKSPACES.get(func._overloadpacket)
    if measure is None or args[0].dtype not in _FLASH_DTYPES or kwargs.get("attn_mask") is not None:
        return 0
    return measure(args, arch)


def cublas_bytes(arch: str) -> int:
    """What cuBLAS holds from the first matrix product on, in all threads of a process."""
    if chosen := re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")):
        return _THREADS * sum(int(kib) * 1024 * int(count) for kib, count in chosen)
    large = arch.removeprefix("sm_") in ("90", "100", "103", "120", "121")
    return _THREADS * (32 * 2**20 if large else 2 * 4096 * 1024 + 8 * 16 * 1024)


def _flash_forward(args: Sequence[Any], arch: str) -> int:
    q_BHND, k_BHND = args[0], args[1]
    batch, heads, queries, dim = q_BHND.shape
    block = 256 if dim <= 64 else 128 if dim <= 128 else 64
    splits = _splits(
        batch * heads * math.ceil(queries / 64),
        2 * _MULTIPROCESSORS.get(arch, 0),
        math.ceil(k_BHND.shape[2] / block),
    )
    return splits * batch * heads * queries * (_rounded_dim(dim) + 1) * _FP32_BYTES if splits > 1 else 0


def _splits(blocks: int, processors: int, key_blocks: int) -> int:
    """Parts of the keys: the fewest with 85 % of the best share of busy processors; 1 where they are busy."""
    if blocks >= 0.8 * processors:
        return 1
    per_split = {n: math.ceil(key_blocks / n) for n in range(1, min(128, processors, key_blocks) + 1)}
    able = [n for n in per_split if n == 1 or per_split[n] != per_split[n - 1]]
    waves = {n: blocks * n / processors for n in able}
    busy = {n: waves[n] / math.ceil(waves[n]) for n in able}
    return next(n for n in able if busy[n] >= 0.85 * max(busy.values()))


def _flash_backward(args: Sequence[Any], arch: str) -> int:
    grad_BHND, q_BHND, out_BHND = args[0], args[1], args[4]
    batch, heads, queries, dim = map(int, q_BHND.shape)
    rows = batch * heads * _round_up(queries, 128)
    copies: int = sum(x.nbytes for x in (grad_BHND, out_BHND) if not x.transpose(1, 2).is_contiguous())
    return rows * (_rounded_dim(dim) + 1) * _FP32_BYTES + copies


def _rounded_dim(dim: int) -> int:
    return _round_up(dim, 32 if dim <= 128 else 64)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# A CPU's operators stand for a GPU's where tensors have no data; both take their tensors in this order:
# forward (q, k, v, ...), backward (grad_out, q, k, v, out, ...).
_WORKSPACES: dict[Any, Callable[[Sequence[Any], str], int]] = {
    _aten._scaled_dot_product_flash_attention: _flash_forward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _flash_forward,
    _aten._scaled_dot_product_flash_attention_backward: _flash_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}
