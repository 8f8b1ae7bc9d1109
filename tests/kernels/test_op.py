"""An operator is itself wherever somebody looks, and a plain call where nobody does; results are the same."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dtrain.kernels.op import Operator


def _scale(x: Tensor, factor: float) -> Tensor:
    return x * factor


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factor = inputs[1]


scale = Operator(
    "dtrain_test::scale(Tensor x, float factor) -> Tensor",
    cpu=_scale,
    cuda=_scale,
    fake=lambda x, factor: torch.empty_like(x),
    flops=lambda x, *_, **__: 7 * x.numel(),
    save=_save,
    backward=lambda ctx, grad: (grad * ctx.factor, None),
)


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one with each call that goes through the dispatcher."""
    calls: list[bool] = []
    overload = scale.overload
    monkeypatch.setattr(scale, "overload", lambda *args: calls.append(True) or overload(*args))
    return calls


def test_a_plain_call_goes_around_the_dispatcher(dispatched: list[bool]) -> None:
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(scale(x, 2.0), x, torch.ones(3))
    assert grad.equal(torch.full((3,), 2.0))
    with torch.no_grad():
        assert scale(torch.nn.Parameter(x), 2.0).equal(2 * x)
    assert dispatched == []


def test_around_and_through_give_the_same() -> None:
    x = torch.randn(3, requires_grad=True)
    for call in (scale, scale.overload):
        y = call(x, 3.0)
        assert y.equal(3 * x)
        assert torch.autograd.grad(y, x, torch.ones(3))[0].equal(torch.full((3,), 3.0))


def test_a_dispatch_mode_sees_the_operator(dispatched: list[bool]) -> None:
    x = torch.randn(3, requires_grad=True)
    with Seen() as seen:
        scale(x, 2.0)
    assert seen.names[0] == "dtrain_test::scale"
    assert len(dispatched) == 1


def test_its_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        scale(torch.randn(3), 2.0)
    assert counter.get_total_flops() == 21


def test_a_compiled_graph_holds_the_operator() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    x = torch.randn(3)
    assert torch.compile(lambda x: scale(x, 2.0), backend=backend, fullgraph=True)(x).equal(2 * x)
    assert scale.overload in {node.target for node in graphs[0].graph.nodes}


def test_a_device_without_a_kernel_gets_shapes() -> None:
    assert scale(torch.empty(3, device="meta"), 2.0).shape == (3,)


def test_a_tensor_subclass_goes_through_the_dispatcher(dispatched: list[bool]) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(3))
    scale(fake, 2.0)
    assert len(dispatched) == 1


def test_functorch_goes_through_the_dispatcher(dispatched: list[bool]) -> None:
    x = torch.randn(2, 3)
    assert torch.vmap(lambda row: scale(row, 2.0))(x).equal(2 * x)
    assert len(dispatched) == 1


def test_a_second_derivative_is_refused_not_zero() -> None:
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(scale(x, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
