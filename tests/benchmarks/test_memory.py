"""Peaks against bytes that were added up by hand."""

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_bytes, persistent_bytes


def test_peak_of_a_chain_with_releases():
    def work() -> None:
        a = torch.empty(1000)  # 4000
        b = torch.empty(500)  # 6000
        del a  # 2000
        c = torch.empty(2000, dtype=torch.float64)  # 18000
        del b, c
        torch.empty(17_999, dtype=torch.uint8)

    assert peak_bytes(work) == 18_000


def test_views_are_free_and_reshapes_that_copy_are_not():
    x = torch.empty(10, 20)
    assert peak_bytes(lambda: x.t().unsqueeze(0)[:, 3:]) == 0
    assert peak_bytes(lambda: x.t().reshape(-1)) == 800


def test_what_was_there_before_does_not_count():
    old = [torch.empty(10_000)]

    def work() -> None:
        old.clear()
        torch.empty(100)

    assert peak_bytes(work) == 400


def test_what_outlives_one_call_does_not_disturb_the_next():
    kept = []
    assert peak_bytes(lambda: kept.append(torch.empty(100))) == 400
    kept.clear()
    assert peak_bytes(lambda: kept.append(torch.empty(100))) == 400
    assert peak_bytes(lambda: kept.append(torch.empty(300))) == 1200


def test_training_step_of_two_linear_layers():
    # B = 64, widths 32 -> 128 -> 16, no biases; fp32, so 4 bytes a number
    model = nn.Sequential(nn.Linear(32, 128, bias=False), nn.Linear(128, 16, bias=False))
    x = torch.randn(64, 32)

    def step() -> None:
        model(x).backward(torch.ones(64, 16))
        model.zero_grad()

    h, y, w1, w2 = (4 * n for n in (64 * 128, 64 * 16, 128 * 32, 16 * 128))
    # h is kept for w2's gradient; y and y's gradient are held by the caller. After the second layer's
    # backward w2's and h's gradients are there as well; then h goes and w1's gradient comes.
    assert peak_bytes(step) == max(h + y + y + w2 + h, y + y + w2 + h + w1)


def test_persistent_state_counts_shared_storage_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    assert persistent_bytes(model, optimizer) == 4 * (64 + 8)
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    moments_and_step = 2 * 4 * (64 + 8) + 2 * 4
    assert persistent_bytes(model, optimizer) == 4 * (64 + 8) + moments_and_step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak():
    assert peak_bytes(lambda: torch.empty(1024, device="cuda"), "cuda") == 4096
