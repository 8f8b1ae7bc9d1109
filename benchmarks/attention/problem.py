"""One size of attention with its inputs, the truth about it, and calls that do the work on them.

Inputs are views of one packed (B, N, 3, H, D), as a model's qkv layer makes it. Errors are those of the first
and the last head, held against fp64.

Shapes: B batch, H heads, N tokens, D width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks.attention import exact
from benchmarks.sweep.errors import relative_error, worst_error
from dtrain.kernels.block_mask import BlockMask

__all__ = ["Attend", "Backward", "Forward", "Problem", "Shape"]

# q, k, v, each (B, H, N, D), to the output (B, H, N, D).
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """How large a problem is."""

    batch: int
    heads: int
    tokens: int
    head_dim: int

    def flops(self, pairs: int | None = None) -> int:
        """Of a forward pass, 4·D a pair of query and key in every head; a backward has five halves of it.

        Args:
            pairs: of a head; all N² when None.
        """
        return 4 * self.batch * self.heads * self.head_dim * (self.tokens**2 if pairs is None else pairs)

    def tensor_bytes(self, itemsize: int = 2) -> int:
        """Of q, and of every other tensor of its shape."""
        return self.batch * self.heads * self.tokens * self.head_dim * itemsize


class Problem:
    """Inputs and the truth, drawn and computed when they are first asked for."""

    def __init__(
        self, shape: Shape, device: str, dtype: torch.dtype, mask: BlockMask | None = None, seed: int = 0
    ) -> None:
        self.shape, self.device, self.dtype, self.mask, self.seed = shape, device, dtype, mask, seed

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, D) that ask for gradients."""
        s = self.shape
        packed = self._draw(s.batch, s.tokens, 3, s.heads, s.head_dim)
        q, k, v = (x.detach().requires_grad_() for x in packed.permute(2, 0, 3, 1, 4))
        return q, k, v

    @cached_property
    def grad(self) -> Tensor:
        """The gradient of the output, (B, H, N, D), as a projection after it leaves it."""
        s = self.shape
        return self._draw(s.batch, s.tokens, s.heads, s.head_dim, salt=1).transpose(1, 2)

    @cached_property
    def exact_out(self) -> Tensor:
        """(2, N, D) in fp64."""
        q, k, v = map(self.heads, self.qkv)
        return exact.forward(q, k, v, self.allowed)[0]

    @cached_property
    def exact_gradients(self) -> tuple[Tensor, ...]:
        """dq, dk, dv, each (2, N, D) in fp64."""
        q, k, v = map(self.heads, self.qkv)
        return exact.gradients(self.heads(self.grad), q, k, v, self.allowed)

    @property
    def allowed(self) -> Tensor | None:
        return None if self.mask is None else self.mask.dense().to(self.device)

    @staticmethod
    def heads(x: Tensor) -> Tensor:
        """The first and the last head of (B, H, N, D), as (2, N, D)."""
        return torch.stack([x[0, 0], x[-1, -1]]).detach()

    def _draw(self, *shape: int, salt: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(2 * self.seed + salt)
        wide = self.dtype if self.device == "cuda" else torch.float32
        return torch.randn(shape, generator=generator, device=self.device, dtype=wide).to(self.dtype)


class Forward:
    """One forward pass, as in training: what a backward would need is kept until the call returns."""

    def __init__(self, problem: Problem, attend: Attend) -> None:
        self.problem, self.attend = problem, attend

    def __call__(self) -> Tensor:
        return self.attend(*self.problem.qkv)

    def error(self) -> float:
        """Relative to fp64."""
        return relative_error(self.problem.heads(self()), self.problem.exact_out)


class Backward:
    """One backward pass; the forward pass before it is made once, here.

    Args:
        gradients: from the output and its gradient to dq, dk, dv; autograd's when None.
    """

    def __init__(
        self,
        problem: Problem,
        attend: Attend,
        gradients: Callable[[], tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.problem = problem
        self.out = None if gradients else attend(*problem.qkv)
        self.gradients = gradients

    def __call__(self) -> tuple[Tensor, ...]:
        if self.gradients is not None:
            return self.gradients()
        assert self.out is not None
        return torch.autograd.grad(self.out, self.problem.qkv, self.problem.grad, retain_graph=True)

    def error(self) -> float:
        """The worst of dq, dk and dv, relative to fp64; NaN where one of them is."""
        return worst_error(zip(map(self.problem.heads, self()), self.problem.exact_gradients, strict=True))
