"""A norm that waits for the scale and the shift that a model's own code applies to it.

DiT-style blocks norm without weights and then modulate by the condition (adaLN, Peebles & Xie, arXiv
2212.09748): `norm(x) * (1 + scale) + shift`, written out by each model in its own way. That is three passes
over memory where one would do. So a swapped norm returns an object that knows its input only; a product with
a (B, 1, D) and a sum with another are taken in, and whatever else is done to it computes it first, in one
pass. The model's code runs as it is.

PyTorch's own protocol carries it: https://docs.pytorch.org/docs/stable/notes/extending.html (Extending torch
with a Tensor-like type). `torch.compile` traces through.

Shapes: B batch, N tokens, D width.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["DeferredNorm", "computed"]

# scale and shift (B, D) or None, and y's dtype, to y.
Compute = Callable[[Tensor | None, Tensor | None, torch.dtype], Tensor]


class DeferredNorm:
    """norm(x), of which nothing is computed until its values are needed.

    Args:
        compute: gives the normed, scaled and shifted x.
        x: (B, N, D).
        dtype: of the result, unless it is cast right away.
        factor: (B, 1, D), which stands for 1 + scale.
        shift: (B, 1, D).
    """

    def __init__(
        self,
        compute: Compute,
        x: Tensor,
        dtype: torch.dtype,
        factor: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        self._compute, self._x, self._factor, self._shift = compute, x, factor, shift
        self.shape, self.dtype, self.device, self.ndim = x.shape, dtype, x.device, x.ndim
        self._value: Tensor | None = None

    def tensor(self) -> Tensor:
        """The values, (B, N, D); computed once."""
        if self._value is None:
            self._value = self._as(self.dtype)
        return self._value

    def _as(self, dtype: torch.dtype) -> Tensor:
        # 1 + scale in bf16, less 1 in fp32, is exact.
        scale = None if self._factor is None else self._rows(self._factor.float() - 1)
        shift = None if self._shift is None else self._rows(self._shift)
        return self._compute(scale, shift, dtype)

    def _rows(self, x: Tensor) -> Tensor:
        return x.squeeze(1).expand(self.shape[0], -1)

    def _fits(self, other: object) -> bool:
        """Whether it is one row for each sample, or one for all."""
        if not isinstance(other, Tensor) or other.dim() != 3:
            return False
        batch, tokens, width = other.shape
        return batch in (1, self.shape[0]) and tokens == 1 and width == self.shape[-1]

    def _with(self, factor: Tensor | None, shift: Tensor | None, new: Tensor) -> "DeferredNorm":
        dtype = torch.promote_types(self.dtype, new.dtype)
        return DeferredNorm(self._compute, self._x, dtype, factor, shift)

    def _scaled(self, other: Any) -> Any:
        if self._factor is None and self._shift is None and self._fits(other):
            return self._with(other, None, other)
        return torch.mul(self.tensor(), other)

    def _shifted(self, other: Any) -> Any:
        if self._shift is None and self._fits(other):
            return self._with(self._factor, other, other)
        return torch.add(self.tensor(), other)

    __mul__ = __rmul__ = mul = _scaled
    __add__ = __radd__ = _shifted

    def type_as(self, other: Tensor) -> Tensor:
        """As a tensor's; the norm rounds to that dtype itself."""
        return self._as(other.dtype) if self._value is None else self._value.type_as(other)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if len(args) == 2 and not kwargs and (function in _PRODUCTS or function in _SUMS):
            waiting, other = args if isinstance(args[0], cls) else reversed(args)
            return waiting._scaled(other) if function in _PRODUCTS else waiting._shifted(other)
        args, kwargs = tree_map_only(cls, cls.tensor, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def __len__(self) -> int:
        return len(self.tensor())


def computed(x: "Tensor | DeferredNorm") -> Tensor:
    """The values: an operator of our own is not told of by `__torch_function__`."""
    return x.tensor() if isinstance(x, DeferredNorm) else x


def _delegated(name: str) -> Callable[..., Any]:
    """An operator, which Python looks up in the class, on the values."""

    def operate(self: DeferredNorm, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*(x.tensor() if isinstance(x, DeferredNorm) else x for x in args))

    return operate


_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
for _name in ("sub", "rsub", "truediv", "rtruediv", "matmul", "rmatmul", "pow", "neg", "abs", "iter"):
    setattr(DeferredNorm, f"__{_name}__", _delegated(f"__{_name}__"))
