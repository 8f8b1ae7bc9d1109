"""Random bits belong to an element, rounding by chance is right on average, minifloats are floats."""

import math

import pytest
import torch
from torch import Tensor

from dtrain.kernels.launch import tl, triton
from dtrain.kernels.rounding import (
    from_minifloat,
    mix,
    random_bits,
    round_bf16,
    stochastic_bf16,
    to_minifloat,
    words,
)
from tests.kernels.attention_checks import DEVICE, draw, needs_triton

E4M3 = {"FACTOR": 2.0**-120, "MANTISSA": 3, "LARGEST": 0x7E}


@triton.jit
def _words_kernel(out, seed, first, G: tl.constexpr, W: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    o = i_row[:, None] * W + tl.arange(0, W)[None, :]
    tl.store(out + o, random_bits(seed, (first + i_row * W) // 4, W).to(tl.int64))


@triton.jit
def _bf16_kernel(x, noise, out, W: tl.constexpr):
    o = tl.arange(0, W)[None, :]
    tl.store(out + o, round_bf16(tl.load(x + o), tl.load(noise + o).to(tl.uint32)))


@triton.jit
def _minifloat_kernel(
    x, noise, codes, back,
    W: tl.constexpr, FACTOR: tl.constexpr, MANTISSA: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, W)[None, :]
    bits = tl.load(noise + o).to(tl.uint32) if noise is not None else None
    code = to_minifloat(tl.load(x + o), bits, FACTOR, MANTISSA, LARGEST)
    tl.store(codes + o, code)
    tl.store(back + o, from_minifloat(code, FACTOR, MANTISSA))


def kernel_words(seed: int, first: int, rows: int, width: int) -> Tensor:
    out = torch.empty(rows * width, dtype=torch.int64, device=DEVICE)
    _words_kernel[(rows // 2,)](out, seed, first, G=2, W=width)
    return out


def minifloat(x: Tensor, noise: Tensor | None, **format: float) -> tuple[Tensor, Tensor]:
    codes, back = torch.empty_like(x, dtype=torch.int32), torch.empty_like(x)
    _minifloat_kernel[(1,)](x, noise, codes, back, W=x.numel(), **format)
    return codes, back


def test_known_answers_of_philox() -> None:
    """Of Random123, kat_vectors: philox4x32 10, all zeros."""
    assert [hex(w) for w in words(0, 0, 4).tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


@needs_triton
@pytest.mark.parametrize("first", [0, 64, 2**34 + 8])
@pytest.mark.parametrize("seed", [0, 2**62 + 12345])
def test_kernels_and_tensors_have_the_same_words(seed: int, first: int) -> None:
    assert kernel_words(seed, first, 4, 32).equal(words(seed, first, 128, DEVICE))
    assert kernel_words(seed, first, 8, 16).equal(words(seed, first, 128, DEVICE))


def test_words_belong_to_elements() -> None:
    whole = words(7, 0, 100)
    for first, count in ((0, 1), (1, 7), (3, 97), (50, 50)):
        assert words(7, first, count).equal(whole[first : first + count])
    assert words(7, 5, 0).shape == (0,)


def test_words_are_uniform_and_seeds_unrelated() -> None:
    """Mean and correlation within 5 standard errors: a fair generator fails once in a million runs."""
    n = 2**18
    a, b = (words(mix(seed), 0, n).double() / 2**32 for seed in (1, 2))
    assert abs(a.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 5 / math.sqrt(n)
    assert abs(((a[1:] - 0.5) * (a[:-1] - 0.5)).mean() * 12) < 5 / math.sqrt(n)


def test_mixed_seeds_differ_and_fit() -> None:
    seeds = {mix(*key) for key in ((), (0,), (0, 0), (1, 0), (0, 1), (1,), (2**63,))}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)


def round_once(x: Tensor, noise: Tensor, kernel: bool) -> Tensor:
    if not kernel:
        return stochastic_bf16(x, noise).float()
    out = torch.empty_like(x)
    _bf16_kernel[(1,)](x, noise, out, W=x.numel())
    return out


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
def test_bf16_by_chance_is_right_on_average(kernel: bool) -> None:
    """A bias of 1 % of the step is 10 standard errors of the mean: it would not pass."""
    n = 2**18
    noise = words(3, 0, n, DEVICE)
    for value in (1.0 + 0.25 / 128, -3.0 - 0.9 / 64, 1e-39):
        x = torch.full((n,), value, device=DEVICE)
        step = float(x[0].bfloat16().abs().nextafter(torch.tensor(math.inf, device=DEVICE).bfloat16()))
        step -= float(x[0].bfloat16().abs())
        rounded = round_once(x, noise, kernel)
        assert rounded.equal(rounded.bfloat16().float())
        assert float((rounded - x).abs().max()) < step
        assert abs(float((rounded.double() - x.double()).mean())) < 5 * 0.5 * step / math.sqrt(n)


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
def test_bf16_by_chance_keeps_what_bf16_holds(kernel: bool) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan, 2.0**-133], device=DEVICE)
    rounded = round_once(x, torch.full((8,), 0xFFFFFFFF, device=DEVICE), kernel)
    torch.testing.assert_close(rounded, x, rtol=0, atol=0, equal_nan=True)


@needs_triton
def test_e4m3_to_nearest_is_pytorchs() -> None:
    x = torch.cat([600 * draw(2**12), 0.02 * draw(2**12, seed=1)]).clamp(-448, 448)
    codes, back = minifloat(x, None, **E4M3)
    wanted = x.abs().cpu().to(torch.float8_e4m3fn)
    assert codes.cpu().equal(wanted.view(torch.uint8).int())
    assert back.cpu().equal(wanted.float())


@needs_triton
def test_every_code_comes_back() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:127].to(DEVICE)
    x = torch.cat([values, values[:1]])
    for noise in (None, torch.full((128,), 0xFFFFFFFF, device=DEVICE)):
        codes, back = minifloat(x, noise, **E4M3)
        assert codes[:127].tolist() == list(range(127))
        assert back.equal(x)


@needs_triton
def test_a_minifloat_by_chance_is_right_on_average() -> None:
    n = 2**18
    noise = words(5, 0, n, DEVICE)
    for value, step in ((1.03, 1 / 8), (300.0, 32.0), (0.0031, 2.0**-9), (2.0**-11, 2.0**-9)):
        x = torch.full((n,), value, device=DEVICE)
        _, back = minifloat(x, noise, **E4M3)
        assert float((back - x).abs().max()) < step
        assert abs(float((back.double() - x.double()).mean())) < 5 * 0.5 * step / math.sqrt(n)
    _, back = minifloat(torch.full((16,), 448.0, device=DEVICE), noise[:16], **E4M3)
    assert back.tolist() == [448.0] * 16
