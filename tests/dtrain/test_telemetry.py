"""NVML: its absence for real, the arithmetic of energy, and a GPU's readings where there is one."""

import logging
import time

import pytest
import torch

from dtrain.metrics.telemetry import PowerIntegral, cuda_uuids, nvml_state, watch

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_no_gpu_in_use_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert watch([]) is None
    assert [r.message for r in caplog.records] == [
        "no GPU in use: utilisation, power and energy are not recorded"
    ]


def test_an_unreadable_gpu_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert watch(["GPU-00000000-0000-0000-0000-000000000000"]) is None
    assert len(caplog.records) == 1
    assert "energy are not recorded: NVML says" in caplog.text


@without_gpu
def test_state_without_a_driver() -> None:
    assert nvml_state().startswith("not available: ")


def test_power_is_integrated_by_trapezoids() -> None:
    readings = iter([(0.0, 100.0), (1.0, 300.0), (3.0, 100.0), (3.0, 500.0)])
    moment = [0.0, 0.0]

    def clock() -> float:
        moment[:] = next(readings)
        return moment[0]

    integral = PowerIntegral(lambda: moment[1], clock)
    assert integral.joules() == 200.0
    assert integral.joules() == 600.0
    assert integral.joules() == 600.0


def test_power_is_sampled_on_a_thread_until_it_is_closed() -> None:
    samples: list[int] = []
    integral = PowerIntegral(lambda: float(samples.append(1) or 50.0)).start()
    deadline = time.monotonic() + 30
    while len(samples) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    integral.close()
    seen = len(samples)
    assert seen >= 3
    assert not integral._thread.is_alive()


@pytest.mark.gpu
def test_a_gpu_is_read() -> None:
    watched = watch(cuda_uuids(1))
    assert watched is not None
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(200):
        a @ a
    torch.cuda.synchronize()
    time.sleep(0.5)
    reading = watched.read()
    watched.close()
    assert 0 <= reading.utilisation <= 1
    assert reading.memory_gib > 0
    assert reading.power_watts > 0
    assert reading.energy_joules > 0
    assert nvml_state().startswith("driver ")
