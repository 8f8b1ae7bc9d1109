"""A norm that waits takes in a scale and a shift however they are written, and is a tensor to all else."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.kernels.norm import norm
from dtrain.swap.deferred import DeferredNorm, computed


class Norm:
    """Norms x and notes with what."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.calls: list[tuple[bool, bool, torch.dtype]] = []

    def compute(self, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        self.calls.append((scale is not None, shift is not None, dtype))
        return norm(self.x, scale=scale, shift=shift, dtype=dtype)

    def deferred(self) -> DeferredNorm:
        return DeferredNorm(self.compute, self.x, self.x.dtype)


def draw() -> tuple[Norm, Tensor, Tensor]:
    torch.manual_seed(0)
    return Norm(torch.randn(2, 5, 8)), torch.randn(2, 1, 8), torch.randn(2, 1, 8)


# As models write it; what is taken in: scale, shift.
FORMS: list[tuple[Callable, tuple[bool, bool]]] = [
    (lambda n, a, b: n * (1 + a) + b, (True, True)),
    (lambda n, a, b: b + (1 + a) * n, (True, True)),
    (lambda n, a, b: torch.add(torch.mul(n, 1 + a), b), (True, True)),
    (lambda n, a, b: n.mul(1 + a) + b, (True, True)),
    (lambda n, a, b: n * (1 + a[:1]) + b[:1], (True, True)),  # one for all samples
    (lambda n, a, b: (n * (1 + a) + b).type_as(b), (True, True)),
    (lambda n, a, b: n * (1 + a), (True, False)),
    (lambda n, a, b: n + b, (False, True)),
    (lambda n, a, b: (n + b) * (1 + a), (False, True)),  # another order is another result
    (lambda n, a, b: n * (1 + a) * (1 + a) + b, (True, False)),
    (lambda n, a, b: n * (1 + a) + b + b, (True, True)),
    (lambda n, a, b: n * 2.0 + 1.0, (False, False)),
    (lambda n, a, b: n * (1 + a.expand(2, 5, 8)) + b, (False, False)),  # one for each token
    (lambda n, a, b: n * (1 + a[:, :, :1]), (False, False)),
    (lambda n, a, b: F.linear(n, a[:, 0]) - b[:, :, :1], (False, False)),
    (lambda n, a, b: 1 - n / 2 + (-n) ** 2 @ a.mT, (False, False)),
    (lambda n, a, b: n.transpose(1, 2)[0], (False, False)),
    (lambda n, a, b: torch.cat([*n, *n[1:]]) if len(n) == 2 else n, (False, False)),
    (lambda n, a, b: n - n.abs() / abs(n) if n.requires_grad is False else n, (False, False)),
]


@pytest.mark.parametrize(("form", "taken"), FORMS)
def test_each_form(form: Callable, taken: tuple[bool, bool]) -> None:
    made, a, b = draw()
    found = computed(form(made.deferred(), a, b))
    torch.testing.assert_close(found, form(norm(made.x), a, b))
    assert made.calls == [(*taken, torch.float32)]


def test_one_norm_may_be_modulated_twice() -> None:
    made, a, b = draw()
    waiting = made.deferred()
    first, second = waiting * (1 + a) + b, waiting * (1 + b) + a
    torch.testing.assert_close(computed(first), norm(made.x) * (1 + a) + b)
    torch.testing.assert_close(computed(second), norm(made.x) * (1 + b) + a)


def test_nothing_is_computed_for_its_shape() -> None:
    made, _, _ = draw()
    waiting = made.deferred()
    assert (waiting.shape, waiting.dtype, waiting.ndim) == (made.x.shape, made.x.dtype, 3)
    assert waiting.device == made.x.device
    assert made.calls == []


def test_dtypes_are_those_of_the_arithmetic() -> None:
    made, a, b = draw()
    half = Norm(made.x.bfloat16())
    assert computed(half.deferred() * (1 + a) + b).dtype == torch.float32
    assert computed(half.deferred() * (1 + a).bfloat16() + b.bfloat16()).dtype == torch.bfloat16
    assert (made.deferred() * (1 + a) + b).type_as(half.x).dtype == torch.bfloat16
    assert [call[2] for call in half.calls] == [torch.float32, torch.bfloat16]
    assert made.calls == [(True, True, torch.bfloat16)]  # cast as it is stored


def test_gradients_reach_scale_and_shift() -> None:
    made, a, b = draw()
    leaves = [x.requires_grad_() for x in (made.x, a, b)]
    grad = torch.randn(2, 5, 8)
    found = torch.autograd.grad(computed(made.deferred() * (1 + a) + b), leaves, grad)
    wanted = torch.autograd.grad(F.layer_norm(made.x, (8,)) * (1 + a) + b, leaves, grad)
    torch.testing.assert_close(found, wanted)
