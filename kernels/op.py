"""How every kernel becomes an operator of PyTorch's dispatcher, and when it is called without it.

Only operators can be saved by selective checkpointing, compiled through and counted by the FLOP counter. But
the way through the dispatcher costs about 60 µs of the host a call, both ways (2 CPU cores, torch 2.13), more
than many kernels take. So an operator is called as an autograd function, or plainly, wherever nobody looks:
no torch.compile, no dispatch mode, no functorch transform, no tensor subclass.

An operator that keeps arguments alone can keep them before it computes. Then PyTorch's checkpointing, which
stops to compute again once all that was saved is there, stops in front of the operator that ends a block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

__all__ = ["Operator", "kernel_of"]

_PLAIN = (Tensor, nn.Parameter)
_kernels: dict[Any, dict[str, Callable[..., Any]]] = {}  # of each operator, by type of device


def kernel_of(overload: Any, device_type: str) -> Callable[..., Any] | None:
    """What runs when an operator of ours is called on "cpu" or "cuda"; None for operators of others."""
    return _kernels.get(overload, {}).get(device_type)


class Operator:
    """One operator; calling it runs the kernel of the tensors' device.

    Args:
        schema: "dtrain::name(Tensor x, ...) -> ...". The first argument is a tensor. One that is
            written to is marked, "Tensor(a!)", and then there is no backward.
        cpu, cuda: the kernels.
        fake: shapes and dtypes of the outputs, without their values.
        flops: FLOPs by the shapes of the arguments; None for an operator without matrix products.
        save: keeps what the backward pass needs, `save(ctx, inputs, output)`.
        backward: gradients by the inputs, `backward(ctx, *grads)`; makes it differentiable, once.
        shape: of the output by the arguments, for an operator whose `save` keeps arguments alone and whose
            one output has the first one's dtype. They are kept before the kernel runs.
    """

    def __init__(
        self,
        schema: str,
        *,
        cpu: Callable[..., Any],
        cuda: Callable[..., Any],
        fake: Callable[..., Any],
        flops: Callable[..., int] | None = None,
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        shape: Callable[..., tuple[int, ...]] | None = None,
    ) -> None:
        name, _, arguments = schema.partition("(")
        namespace, _, leaf = name.partition("::")
        torch.library.define(name, f"({arguments}")
        torch.library.impl(name, "cpu", cpu)
        torch.library.impl(name, "cuda", cuda)
        torch.library.register_fake(name, fake)
        self.overload = getattr(getattr(torch.ops, namespace), leaf).default
        self._kernels = _kernels[self.overload] = {"cpu": cpu, "cuda": cuda}
        self._function: Any = None
        self._keep: Any = None
        if flops is not None:
            register_flop_formula(self.overload._overloadpacket)(flops)
        if save is not None and backward is not None:
            torch.library.register_autograd(name, backward, setup_context=save)
            self._function = _function(leaf, self._run, save, backward)
            self._keep = None if shape is None else _keep(leaf, shape, save, backward)

    def __call__(self, *args: Any) -> Any:
        plain = _nobody_looks(args) and args[0].device.type in self._kernels
        if self._keep is not None and torch.is_grad_enabled() and not _traced():
            return _Behind.apply(self._keep.apply(*args), self._run if plain else self.overload, args)
        if not plain:
            return self.overload(*args)
        if self._function is None or not torch.is_grad_enabled():
            return self._run(*args)
        return self._function.apply(*args)

    def _run(self, *args: Any) -> Any:
        return self._kernels[args[0].device.type](*args)


def _nobody_looks(args: tuple[Any, ...]) -> bool:
    return not (
        _traced()
        or is_in_torch_dispatch_mode()
        or any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in args)
    )


def _traced() -> bool:
    """By torch.compile, whose partitioner knows what need not be computed again, or by functorch."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _function(
    name: str, run: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        # Not apart from `setup_context`, with which PyTorch inspects a signature at every call: 30 µs.
        output = run(*args)
        save(ctx, args, output)
        return output

    members = {
        "forward": staticmethod(forward),
        # Kernels leave no graph behind: a second derivative would be silently zero.
        "backward": staticmethod(once_differentiable(backward)),
    }
    return type(name, (torch.autograd.Function,), members)


def _keep(
    name: str, shape: Callable[..., tuple[int, ...]], save: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """Keeps the arguments; its output stands for that of the operator and has one element in memory."""

    def forward(ctx: Any, *args: Any) -> Any:
        save(ctx, args, None)
        return args[0].new_empty(1).expand(shape(*args))

    members = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type(f"{name}_keep", (torch.autograd.Function,), members)


class _Behind(torch.autograd.Function):
    """The operator itself: its gradient goes to what was kept before."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return run(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
