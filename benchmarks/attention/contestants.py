"""Who computes attention: this project's kernels, each backend of PyTorch's SDPA, and FlexAttention.

What cannot serve a size says so by name: `refusal` calls it once, both ways, and returns its reason.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from benchmarks.attention.problem import Attend, Problem, Shape
from benchmarks.environment import seconds
from benchmarks.sweep import plan
from benchmarks.sweep.compiled import compiled
from dtrain.kernels import attention_backward, attention_forward
from dtrain.kernels.attention import attention
from dtrain.kernels.block_mask import BlockMask

__all__ = ["SDPA", "flex", "flex_mask", "ours", "fastest_sdpa", "our_backward", "refusal", "sdpa"]

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def ours(mask: BlockMask | None = None) -> Attend:
    """The Triton kernels of this project."""
    return lambda q, k, v: attention(q, k, v, mask=mask, backend="triton")


def our_backward(problem: Problem, form: attention_backward.Form) -> Callable[[], tuple[Tensor, ...]]:
    """Our gradients in one of their two forms, launched without autograd."""
    scale = problem.shape.head_dim**-0.5
    q, k, v = (x.detach() for x in problem.qkv)
    out, lse = attention_forward.forward(q, k, v, scale, problem.mask)
    return lambda: attention_backward.backward(
        problem.grad, None, q, k, v, out, lse, scale, problem.mask, form
    )


def sdpa(backend: SDPBackend) -> Attend:
    """PyTorch's attention, by one of its kernels and no other."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def fastest_sdpa(settings: plan.Settings, shape: Shape) -> tuple[str, Mapping[str, str]]:
    """The fastest of SDPA's kernels both ways, and why others do not serve."""
    problem = Problem(shape, settings.device, settings.dtype)
    times: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for label, kernel in SDPA.items():
        attend = sdpa(kernel)
        if reason := refusal(attend, problem):
            reasons[label] = reason
            continue
        call = partial(_both_ways, problem, attend)
        times[label] = min(seconds(call, settings.kind, cold=True) for _ in range(3))
    if not times:
        raise ValueError(f"shape = {shape}: none of SDPA's kernels serves it: {reasons}")
    return min(times, key=lambda label: times[label]), reasons


def _both_ways(problem: Problem, attend: Attend) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attend(*problem.qkv), problem.qkv, problem.grad)


def flex(device: str, block_mask: flex_attention.BlockMask | None = None) -> Attend:
    """FlexAttention: compiled for the very shapes on a GPU, eager on the CPU."""
    function: Callable[..., Tensor] = flex_attention.flex_attention
    if device == "cuda":
        function = compiled(function)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Its backward is called many times on one graph, which buffers given away would not survive.
        with torch._functorch.config.patch(donated_buffer=False):
            return function(q, k, v, block_mask=block_mask)

    return attend


def flex_mask(mask: BlockMask, device: str) -> flex_attention.BlockMask:
    """Our block mask as FlexAttention's, of the same blocks; for masks whose blocks are all full.

    Raises:
        ValueError: some block is not full, so that FlexAttention's regular blocks cannot say it.
    """
    (tokens, _), (block, _) = mask.shape, mask.block
    if tokens % block or any(
        bool((lists.blocks[:, 1] != block).any()) for lists in (mask.queries, mask.keys)
    ):
        raise ValueError(f"mask = {mask}: FlexAttention needs blocks of {block} tokens each")
    blocks = mask.queries.blocks.cpu()
    columns = mask.queries.entries.cpu()[:, 0] // block
    allowed = torch.zeros(len(blocks), tokens // block, dtype=torch.int32)
    for row, (start, end) in enumerate(blocks[:, [2, 4]].tolist()):
        allowed[row, columns[start:end].long()] = 1
    counts = allowed.sum(-1, dtype=torch.int32)
    indices = allowed.argsort(dim=-1, descending=True, stable=True).int()
    none = torch.zeros_like(counts)
    partial_counts, partial_indices, full_counts, full_indices = (
        x.to(device)[None, None] for x in (none, indices, counts, indices)
    )
    return flex_attention.BlockMask.from_kv_blocks(
        partial_counts, partial_indices, full_counts, full_indices, BLOCK_SIZE=block
    )


def refusal(attend: Attend, problem: Problem, backward: bool = True) -> str:
    """Why it cannot serve the problem; empty where it can, forwards and, if asked, backwards."""

    def call() -> None:
        out = attend(*problem.qkv)
        if backward:
            torch.autograd.grad(out, problem.qkv, problem.grad)

    return plan.refusal(call, problem.device)
