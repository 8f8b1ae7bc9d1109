"""What an operator costs: floating-point operations, and bytes that it reads and writes.

FLOPs are by PyTorch's formulas and ours (`torch.utils.flop_counter`), bytes those of its tensors, each once.
Views and allocations cost nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

__all__ = ["Work", "work_of"]

_aten = torch.ops.aten
# PyTorch has formulas for those of GPUs alone.
_MORE = {
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
_FREE = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.detach, _aten.alias}


class Work(NamedTuple):
    """Of one operator."""

    flops: int
    nbytes: int


def work_of(func: Any, args: Any, kwargs: Any, out: Any) -> Work | None:
    """What a call cost; None for views, allocations and collectives."""
    packet = func._overloadpacket
    if packet in _FREE or func.namespace in ("c10d", "prim", "profiler") or func.is_view:
        return None
    formula: Any = _MORE.get(packet) or flop_registry.get(packet)
    flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
    tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
    return Work(flops, sum(x.nbytes for x in tensors.values()))
