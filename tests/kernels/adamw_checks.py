"""What the tests of AdamW share: shards, gradients, and the step by its kernel and by its definition."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels import adamw_kernels
from dtrain.kernels.adamw import Hyper, Shard, adamw_, blocks_of_row
from tests.kernels.attention_checks import DEVICE, draw, needs_triton

FP32, BF16 = torch.float32, torch.bfloat16
HOW = Hyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1, ema_weight=0.1)


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few large tiles, on which no result depends: the interpreter takes them one by one."""
    if DEVICE.type == "cpu":
        monkeypatch.setitem(adamw_kernels._TILES, "sm_80", adamw_kernels._Tile(256, 1))


triton = functools.partial(adamw_, backend="triton")
plain = functools.partial(adamw_, backend="reference")
each_backend = pytest.mark.parametrize(
    "step", [pytest.param(triton, marks=needs_triton), plain], ids=["triton", "reference"]
)


def draw_shard(
    shape: tuple[int, ...],
    param: torch.dtype = FP32,
    coded: bool = False,
    ema: torch.dtype | None = None,
    **place: int,
) -> Shard:
    rows, row = (shape[0] if shape else 1), math.prod(shape[1:])
    moment = functools.partial(torch.zeros, shape, dtype=torch.uint8 if coded else FP32, device=DEVICE)
    scale = functools.partial(torch.zeros, rows, blocks_of_row(row), dtype=BF16, device=DEVICE)
    return Shard(
        draw(*shape, seed=1, dtype=param),
        moment(),
        moment(),
        scale() if coded else None,
        scale() if coded else None,
        None if ema is None else draw(*shape, seed=2, dtype=ema),
        **place,
    )


def map_tensors(function: Any, shard: Shard) -> Shard:
    return shard._replace(**{n: function(x) for n, x in shard._asdict().items() if isinstance(x, Tensor)})


def copy_of(shard: Shard) -> Shard:
    return map_tensors(torch.clone, shard)


def draw_grads(shards: list[Shard], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Over many orders of magnitude."""
    return [
        (draw(*s.param.shape, seed=seed) * (3 * draw(*s.param.shape, seed=seed + 1)).exp()).to(dtype)
        for s in shards
    ]


def assert_same(a: Shard, b: Shard, what: object = "") -> None:
    different = [n for n, x in a._asdict().items() if isinstance(x, Tensor) and not x.equal(getattr(b, n))]
    assert not different, (different, what)
