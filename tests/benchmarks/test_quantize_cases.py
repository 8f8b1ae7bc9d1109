"""The cases of quantisation on the CPU: gates hold and notice, bytes are counted, threads are put back."""

from typing import Any

import pytest
import torch

from benchmarks.case import Case, discover
from benchmarks.cases.decode_sum_int8_cpu import RANKS, decode_sum_case
from benchmarks.cases.encode_int8_cpu import INT8, encode_case, one_thread
from benchmarks.harness import check_gates
from dtrain.kernels.quantize import payload_bytes

N = 128 * 37 + 5
CASES = {"encode_int8_cpu": encode_case(N), "decode_sum_int8_cpu": decode_sum_case(N)}


@pytest.mark.parametrize("name", CASES)
def test_gates_hold_and_notice_one_bit(name: str) -> None:
    case = CASES[name]
    works: dict[str, Any] = {name: setup() for name, setup in case.contestants.items()}
    assert [gate.passed for gate in check_gates(case, works)] == [True]
    function = works["dtrain"].function

    def spoiled() -> torch.Tensor:
        out = function()
        out.view(torch.uint8)[N] ^= 1
        return out

    works["dtrain"].function = spoiled
    assert [gate.passed for gate in check_gates(case, works)] == [False]
    works["dtrain"].function = lambda: function()[:-16]
    assert [gate.passed for gate in check_gates(case, works)] == [False]


def test_bytes_are_the_tensors() -> None:
    size = payload_bytes(N, INT8)
    assert CASES["encode_int8_cpu"].cost.bytes == 4 * N + size
    assert CASES["decode_sum_int8_cpu"].cost.bytes == RANKS * size + 4 * N


@pytest.mark.parametrize("name", CASES)
def test_discovery_finds_the_cases_as_large_as_they_say(name: str) -> None:
    case: Case = discover()[name]
    assert "16.8M" in case.title
    assert "one CPU thread" in case.title


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 2
