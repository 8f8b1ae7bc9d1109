"""A module's pass both ways: outputs and all gradients, held against the same module in fp64."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from benchmarks.sweep.errors import worst_error

__all__ = ["ModuleStep", "peak"]


class ModuleStep:
    """One pass both ways; all gradients are made, none is added up.

    Args:
        inputs: first arguments, which ask for gradients; brought to `dtype`.
        grad: of the output; brought to `dtype`.
        constants: further arguments, as they are.
        exact: the truth, of the weights and inputs as they are rounded; called when it is first needed.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Mapping[str, Tensor],
        grad: Tensor,
        constants: tuple[Tensor, ...] = (),
        dtype: torch.dtype = torch.float64,
        exact: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.module, self.constants, self.exact = module, constants, exact
        self.inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        self.grad = grad.to(dtype)
        self.wanted = {**self.inputs, **dict(module.named_parameters())}

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._forward(), list(self.wanted.values()), self.grad)

    def results(self) -> dict[str, Tensor]:
        return {"out": self._forward().detach(), **dict(zip(self.wanted, self(), strict=True))}

    def error(self) -> float:
        """The worst of output and gradients relative to fp64; NaN where one of them is."""
        assert self.exact is not None
        exact, got = self.exact(), self.results()
        return worst_error((got[name], exact[name]) for name in exact)

    def _forward(self) -> Tensor:
        out: Tensor = self.module(*self.inputs.values(), *self.constants)
        return out


def peak(step: ModuleStep) -> float:
    """Bytes that the pass holds at once beyond what was there before it."""
    return peak_bytes(step, step.grad.device)
