"""Swapped third-party models through the Triton kernels, in the interpreter: equal to what they were."""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.kernels.launch import can_launch
from dtrain.swap.attention import swap_attention
from dtrain.swap.fusion import swap_fused
from tests.dtrain import third_party as made
from tests.dtrain.sharded_worker import tiny_dit

pytestmark = pytest.mark.skipif(
    not can_launch(torch.device("cpu")), reason="needs TRITON_INTERPRET=1 in the environment"
)


class Ops(TorchDispatchMode):
    """Counts the operators that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def compare(model: nn.Module, swapped: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    """Losses and all gradients are equal; what the dispatcher saw of the swapped model."""
    wanted = made.loss(model, inputs)
    wanted.backward()
    with Ops() as ops:
        found = made.loss(swapped, inputs)
        found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    for (name, one), other in zip(model.named_parameters(), swapped.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert (one.grad - other.grad).norm() < 1e-5 * whole, name
    return ops.count


@pytest.mark.parametrize(
    ("make", "layers"),
    [(partial(made.dit, 32), 2), (partial(made.wan, 32), 4), (partial(made.wan, 40), 4)],
    ids=["dit", "wan", "wan of head dim 40"],
)
def test_attention(make: Callable[[], made.Made], layers: int) -> None:
    model, inputs = made.filled(make)
    swapped = copy.deepcopy(model)
    swap_attention(swapped, "triton")
    ops = compare(model, swapped, inputs)
    assert ops["dtrain::attention_forward"] == ops["dtrain::attention_backward"] == layers
    assert not [name for name in ops if "scaled_dot_product" in name]


@pytest.mark.parametrize(
    ("make", "norms", "mlps"),
    [(made.dit, 5, 2), (made.wan, 15, 2), (made.cogvideox, 14, 2), (tiny_dit, 6, 3)],
    ids=["dit", "wan", "cogvideox", "tiny_dit"],
)
def test_norms_and_mlps(make: Callable[[], made.Made], norms: int, mlps: int) -> None:
    model, inputs = made.filled(make)
    swapped = copy.deepcopy(model)
    swap_fused(swapped, "triton")
    ops = compare(model, swapped, inputs)
    assert ops["dtrain::norm"] == ops["dtrain::norm_backward"] == norms
    assert ops["dtrain::gelu_linear"] == ops["dtrain::gelu_linear_backward"] == mlps
    assert not [name for name in ops if "layer_norm" in name]
