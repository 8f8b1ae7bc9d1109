"""The matrix products that an operator really does, against the FLOPs that it declares.

FLOP counters know the declared ones alone: the dispatcher runs kernels outside of modes, and products in
place have no formula. So the operator's kernel is called by itself, and its products are seen one by one.
"""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dtrain.kernels.op import Operator


class _Products(TorchDispatchMode):
    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def performed_flops(operator: Operator, *args: Any) -> int:
    with _Products() as products:
        operator._run(*args)
    return products.flops


def declared_flops(operator: Operator, *args: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        operator(*args)
    return counter.get_total_flops()
