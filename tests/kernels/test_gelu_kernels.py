"""The kernels of GELU by themselves, in Triton's interpreter, against fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.kernels import gelu_kernels
from dtrain.kernels.launch import arch_of
from tests.kernels.attention_checks import DEVICE, draw, needs_triton

APPROXIMATE = ["none", "tanh"]


def forward(pre: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    act = torch.full_like(pre, math.nan)
    gelu_kernels.forward(pre, bias, approximate, act)
    return act


def slope(pre: Tensor, approximate: str) -> Tensor:
    """gelu' by the kernel: what it makes of a gradient of ones."""
    grad = torch.ones_like(pre)
    gelu_kernels.backward(grad, pre, None, approximate, None, sums=False)
    return grad


def exact_gelu(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """gelu and gelu' in fp64, by autograd."""
    x = x.double().requires_grad_()
    act = F.gelu(x, approximate=approximate)
    return act.detach(), torch.autograd.grad(act.sum(), x)[0]


@needs_triton
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gelu_and_its_slope_are_as_exact_as_fp32_allows(approximate: str) -> None:
    x = torch.linspace(-12, 12, 2**18, device=DEVICE).view(512, 512)
    act, d = exact_gelu(x, approximate)
    assert (forward(x, approximate=approximate) - act).abs().max() < 8e-7  # x = 12 has an ulp of 9.5e-7
    assert (slope(x, approximate) - d).abs().max() < 8e-7
    small = x.abs() < 1
    assert (forward(x, approximate=approximate) - act)[small].abs().max() < 2e-7


@needs_triton
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_extreme_values(approximate: str) -> None:
    """Limits at infinity, where PyTorch has NaN, and nothing that overflows on the way there."""
    inf, nan = math.inf, math.nan
    x = torch.tensor([[-inf, -3e38, -1e20, -17, -0.0, 0.0, 17, 1e20, 3e38, inf, nan]], device=DEVICE)
    act, d = forward(x, approximate=approximate), slope(x, approximate)
    torch.testing.assert_close(act[:, :-1], x[:, :-1].clamp(min=0), atol=0, rtol=0)
    expected = torch.tensor([[0, 0, 0, 0, 0.5, 0.5, 1, 1, 1, 1]], device=DEVICE)
    torch.testing.assert_close(d[:, :-1], expected, atol=1e-6, rtol=0)
    assert act[0, -1].isnan()
    assert d[0, -1].isnan()


@needs_triton
def test_wider_biases_are_added_in_their_own_precision() -> None:
    pre = torch.ones(1, 64, dtype=torch.float16, device=DEVICE)
    bias = torch.full((64,), -1 - 2e-4, device=DEVICE)  # in fp16 it is -1, and the sum 0
    expected = F.gelu(1 + bias.double())
    torch.testing.assert_close(forward(pre, bias)[0].double(), expected, rtol=1e-3, atol=0)


@needs_triton
@pytest.mark.parametrize(("rows", "hidden"), [(129, 272), (64, 256), (1, 33)])
def test_every_element_is_written_and_none_beyond(rows: int, hidden: int) -> None:
    pre, bias = draw(rows, hidden, dtype=torch.float16), draw(hidden, seed=1, dtype=torch.float16)
    grad = draw(rows, hidden, seed=2, dtype=torch.float16)

    def poisoned() -> tuple[Tensor, Tensor]:
        buffer = torch.full((rows * hidden + 4096,), math.nan, dtype=torch.float16, device=DEVICE)
        return buffer, buffer[: rows * hidden].view(rows, hidden)

    (grad_buffer, in_place), (act_buffer, act) = poisoned(), poisoned()
    in_place.copy_(grad)
    sums = gelu_kernels.backward(in_place, pre, bias, "none", act, sums=True)
    wide = pre.double().requires_grad_()
    exact = F.gelu(wide + bias.double())
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    for ours, theirs in ((in_place, exact_grad), (act, exact.detach()), (forward(pre, bias), exact.detach())):
        assert (ours.double() - theirs).norm() < 4e-4 * theirs.norm()
    assert (sums - exact_grad.sum(0)).norm() < 1e-6 * exact_grad.sum(0).norm()
    for buffer in (grad_buffer, act_buffer):
        assert buffer[rows * hidden :].isnan().all()


@needs_triton
def test_activation_may_take_the_memory_of_its_input() -> None:
    pre, grad = draw(129, 272, dtype=torch.float16), draw(129, 272, seed=1, dtype=torch.float16)
    gradient, act, memory = grad.clone(), torch.empty_like(pre), pre.clone()
    gelu_kernels.backward(gradient, pre, None, "none", act, sums=False)
    gelu_kernels.backward(grad, memory, None, "none", memory, sums=False)
    assert grad.equal(gradient)
    assert memory.equal(act)
    assert act.equal(forward(pre))
    memory.copy_(pre)
    gelu_kernels.forward(memory, None, "none", memory)
    assert memory.equal(act)


@needs_triton
def test_offsets_beyond_31_bits() -> None:
    """The first program alone, on rows that are far apart: pages never touched are free."""
    arch = arch_of(DEVICE)

    def far(rows: int, seed: int) -> tuple[Tensor, Tensor]:
        hidden = 2**31 // (rows - 1) + 256
        x = torch.empty(rows * hidden, dtype=torch.float16, device=DEVICE).view(rows, hidden)
        x[:, :256] = near = draw(rows, 256, seed=seed, dtype=torch.float16)
        return x, near

    constants = gelu_kernels._forward_constants(arch, "none")
    pre, near = far(constants["ROWS"], 0)
    gelu_kernels._forward_kernel[(1,)](pre, None, pre, *pre.shape, **constants, **gelu_kernels._OPTIONS)
    assert pre[:, :256].equal(forward(near))
    constants = gelu_kernels._backward_constants(arch, "none")
    rows = constants["ROWS"] * constants["STEPS"]
    (pre, near), (grad, near_grad) = far(rows, 0), far(rows, 1)
    gelu_kernels._backward_kernel[(1,)](
        grad, pre, None, pre, None, *pre.shape, **constants, **gelu_kernels._OPTIONS
    )
    gelu_kernels.backward(near_grad, near, None, "none", near, sums=False)
    assert grad[:, :256].equal(near_grad)
    assert pre[:, :256].equal(near)
