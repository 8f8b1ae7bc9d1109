"""What PyTorch's GPU kernels take inside, by hand, and where the ledger counts it."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from dtrain.kernels.launch import planned_for
from dtrain.plan.accounts import WORKSPACE
from dtrain.plan.ledger import Ledger
from dtrain.plan.workspace import cublas_bytes


def inside(
    arch: str, *shape: int, dtype: torch.dtype = torch.bfloat16, batch_first: bool = True
) -> list[int]:
    """Bytes that attention takes and gives back on a GPU, call by call."""
    with FakeTensorMode(), planned_for(arch):
        qkv = [torch.empty(shape, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
        ledger = Ledger("cuda")
        with ledger:
            out = F.scaled_dot_product_attention(*qkv)
            grad = torch.ones_like(out) if batch_first else torch.ones(out.shape, dtype=dtype)
            out.backward(grad)
    number = ledger.accounts.index(WORKSPACE)
    first, *deltas = [event.delta for event in ledger.events if event.account == number]
    assert first == cublas_bytes(arch)
    assert deltas[::2] == [-delta for delta in deltas[1::2]]
    return deltas[::2]


def test_flash_attention_accumulates_in_fp32() -> None:
    accumulated, sums = 2 * 384 * 8 * 96 * 4, 2 * 8 * 384 * 4  # 300 rows as 384, 72 numbers as 96
    assert inside("sm_80", 2, 300, 8, 72)[-1] == accumulated + sums
    assert inside("sm_80", 16, 128, 16, 192) == [16 * 128 * 16 * (192 + 1) * 4]
    assert inside("sm_80", 2, 300, 8, 72, dtype=torch.float32) == []


def test_gradients_in_another_order_are_copied() -> None:
    kept = inside("sm_80", 16, 128, 16, 64)
    assert inside("sm_80", 16, 128, 16, 64, batch_first=False) == [kept[0] + 16 * 128 * 16 * 64 * 2]


def test_few_queries_split_their_keys() -> None:
    # 2 heads x 8 blocks of queries on 264 places: both blocks of keys at once are twice as good.
    assert inside("sm_90", 1, 512, 2, 64)[0] == 2 * 2 * 512 * (64 + 1) * 4
    # 96 blocks, 8 of keys: 2 parts keep 73 % of the places busy, 8 parts 97 %, and 5 to 7 would be 4 again.
    assert inside("sm_90", 1, 2048, 3, 64)[0] == 8 * 3 * 2048 * (64 + 1) * 4
    assert len(inside("sm_90", 27, 512, 2, 64)) == 1  # 432 blocks: no split


def test_cublas_holds_a_workspace_of_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert cublas_bytes("sm_90") == 2 * 32 * 2**20
    assert cublas_bytes("sm_80") == 17_039_360  # 8.125 MiB each
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8:16:2")
    assert cublas_bytes("sm_90") == 2 * (8 * 4096 + 2 * 16) * 1024
