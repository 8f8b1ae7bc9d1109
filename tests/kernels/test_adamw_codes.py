"""Moments of eight bits: codes are floats, right on average, and what is not finite is never lost."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels.adamw import Shard
from dtrain.kernels.adamw_reference import decode_first, decode_second, encode_first, encode_second
from dtrain.kernels.rounding import words
from tests.kernels.adamw_checks import FP32, HOW, draw_shard, each_backend, quick_interpreter
from tests.kernels.attention_checks import DEVICE, draw

__all__ = ["quick_interpreter"]
pytestmark = pytest.mark.usefixtures("quick_interpreter")

HALF_FOR_SECOND = 0x8000  # noise that rounds v to nearest


def blocks(scale: float, seed: int = 0, count: int = 64) -> Tensor:
    """Blocks (…, 128) over many orders of magnitude."""
    return scale * draw(count, 128, seed=seed) * (2 * draw(count, 128, seed=seed + 1)).exp()


def code_step(x: Tensor, scales: Tensor, deepest: int) -> Tensor:
    """Between the codes about x: sixteen from a power of two to the next, as far down as 2^deepest."""
    floor = scales.float()[..., None] * 2.0**deepest
    return 2.0 ** (torch.frexp(x.abs().maximum(floor)).exponent.double() - 1 - 4)


FORMATS = [(encode_first, decode_first, -6), (encode_second, decode_second, -14)]


@pytest.mark.parametrize(("encode", "decode", "deepest"), FORMATS, ids=["first", "second"])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e20])
def test_codes_come_back_within_a_step_and_right_on_average(
    encode: Any, decode: Any, deepest: int, scale: float
) -> None:
    x = blocks(scale)
    x = x if encode is encode_first else x.abs()
    total = torch.zeros_like(x, dtype=torch.float64)
    count = 200
    for seed in range(count):
        codes, scales = encode(x, words(seed, 0, x.numel(), DEVICE).view(x.shape))
        error = (decode(codes, scales).double() - x.double()) / code_step(x, scales, deepest)
        assert float(error.abs().max()) < 1
        total += error
    mean = total / count
    if encode is encode_second:  # code 1 stands for all below it
        mean = mean[x > 2.0**-17 * scales.float()[:, None]]
    assert abs(float(mean.mean())) < 5 * 0.5 / math.sqrt(count * mean.numel())
    assert float(mean.abs().max()) < 6 * 0.5 / math.sqrt(count)


def test_scales_are_the_least_power_of_two_that_clips_nothing() -> None:
    x = torch.zeros(5, 128, device=DEVICE)
    x[:, 3] = torch.tensor([1.0, 1.9375, 1.9376, 2.0, -3.0])
    ones = torch.full(x.shape, 0xFFFFFFFF, device=DEVICE)
    for encode, decode in ((encode_first, decode_first), (encode_second, decode_second)):
        codes, scales = encode(x.abs(), ones)
        assert scales.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]
        assert decode(codes, scales)[:, 3].tolist() == [1.0, 1.9375, 2.0, 2.0, 3.0]
    codes, scales = encode_first(x, ones)
    assert decode_first(codes, scales)[:, 3].tolist() == [1.0, 1.9375, 2.0, 2.0, -3.0]


def test_a_second_moment_above_zero_never_vanishes() -> None:
    v = torch.full((1, 128), 1e-35, device=DEVICE)
    v[0, 0] = 1.0
    v[0, 1] = 0.0
    codes, scales = encode_second(v, torch.zeros(1, 128, dtype=torch.int64, device=DEVICE))
    back = decode_second(codes, scales)[0]
    assert back[:2].tolist() == [1.0, 0.0]
    assert back[2:].unique().tolist() == [2.0**-18]


@each_backend
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_not_finite_is_never_lost(step: Any, bad: float) -> None:
    """1e30 overflows in its square alone. Only its own block is poisoned."""
    shard = draw_shard((2, 384), coded=True)
    grad = draw(2, 384)
    grad[1, 130] = bad
    step([shard], [grad], HOW)
    m, v = decoded(shard)
    poisoned = v.isnan() if bad == 1e30 else v.isnan() & m.isnan()
    assert poisoned[1, 1].all()
    assert int(poisoned.sum()) == 128
    step([shard], [draw(2, 384, seed=1)], HOW._replace(step=2))
    assert shard.param[1, 128:256].isnan().all()
    assert int(shard.param.isnan().sum()) == 128


def decoded(shard: Shard) -> tuple[Tensor, Tensor]:
    """Moments of a shard with rows of whole blocks, in blocks."""
    codes = [x.view(*shard.exp_avg_scale.shape, 128) for x in (shard.exp_avg, shard.exp_avg_sq)]
    return decode_first(codes[0], shard.exp_avg_scale), decode_second(codes[1], shard.exp_avg_sq_scale)


@each_backend
def test_each_step_of_coded_moments_is_one_rounding_off(step: Any) -> None:
    shard = draw_shard((8, 256), coded=True)
    for number in range(1, 30):
        m, v = decoded(shard)
        grad = draw(8, 256, seed=number)
        step([shard], [grad], HOW._replace(step=number))
        new_m, new_v = decoded(shard)
        grad = grad.view(8, 2, 128)
        error = (new_m - (0.9 * m + 0.1 * grad)).abs() / code_step(new_m, shard.exp_avg_scale, -6)
        assert float(error.max()) < 1.001
        error = (new_v - (0.99 * v + 0.01 * grad**2)).abs() / code_step(new_v, shard.exp_avg_sq_scale, -14)
        assert float(error.max()) < 1.001


def test_coded_averages_follow_and_rounding_to_nearest_would_not() -> None:
    """v of gradients that shrink to a third, over thousands of steps at β2 = 0.999."""
    beta, count, n = 0.999, 2500, 1024
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    exact = torch.ones(n // 128, 128, device=DEVICE)
    zeros = torch.zeros(exact.shape, dtype=torch.int64, device=DEVICE)
    kept = {"chance": encode_second(exact, zeros), "nearest": encode_second(exact, zeros)}
    for number in range(count):
        square = (torch.randn(exact.shape, generator=generator, device=DEVICE) / 3).square() * (1 - beta)
        exact = exact * beta + square
        for name, (codes, scales) in kept.items():
            noise = (
                words(number, 0, n, DEVICE).view(exact.shape) if name == "chance" else zeros + HALF_FOR_SECOND
            )
            kept[name] = encode_second(decode_second(codes, scales) * beta + square, noise)
    ratio = {name: float(decode_second(*codes).mean() / exact.mean()) for name, codes in kept.items()}
    assert ratio["chance"] == pytest.approx(1, abs=0.03)
    assert ratio["nearest"] > 3  # most have not moved


def test_moments_that_share_a_word_are_rounded_independently() -> None:
    n = 2**18
    noise = words(11, 0, n, DEVICE).view(-1, 128)
    value = torch.full_like(noise, 1, dtype=FP32) + 1 / 32  # half way between two codes
    up = [
        (decode(*encode(value, noise)) > value).double()
        for encode, decode in ((encode_first, decode_first), (encode_second, decode_second))
    ]
    assert all(abs(float(x.mean()) - 0.5) < 2.5 / math.sqrt(n) for x in up)
    assert abs(float(((up[0] - 0.5) * (up[1] - 0.5)).mean() * 4)) < 5 / math.sqrt(n)
