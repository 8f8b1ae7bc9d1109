"""What the GPUs of this host do meanwhile: utilisation, memory, power and energy, read through NVML.

Energy is the driver's own counter where there is one (Volta and later), otherwise power integrated over time
by a sampling thread (trapezoid rule). NVML: https://docs.nvidia.com/deploy/nvml-api/
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

POWER_SAMPLE_S = 0.2


@dataclass(frozen=True)
class Reading:
    """The watched GPUs at one moment; `utilisation` is their mean, the other values their sums."""

    utilisation: float
    """Share of the last sampling period in which a kernel ran, 0 to 1."""
    memory_gib: float
    power_watts: float
    energy_joules: float
    """Since `watch` was called."""


class Watch:
    """Reads a fixed set of GPUs; made by `watch`."""

    def __init__(self, nvml: Any, handles: Sequence[Any]) -> None:
        self._nvml = nvml
        self._handles = list(handles)
        self._gpus = [_energy_meter(nvml, handle) for handle in handles]

    def read(self) -> Reading:
        """Read all watched GPUs now (about a millisecond each)."""
        nvml, handles = self._nvml, self._handles
        busy = [nvml.nvmlDeviceGetUtilizationRates(h).gpu for h in handles]
        used = [nvml.nvmlDeviceGetMemoryInfo(h).used for h in handles]
        return Reading(
            utilisation=sum(busy) / len(busy) / 100,
            memory_gib=sum(used) / 1024**3,
            power_watts=sum(_watts(nvml, h) for h in handles),
            energy_joules=sum(gpu.joules() for gpu in self._gpus),
        )

    def close(self) -> None:
        for gpu in self._gpus:
            gpu.close()
        self._nvml.nvmlShutdown()


def watch(uuids: Sequence[str]) -> Watch | None:
    """Start to watch the GPUs with these UUIDs ("GPU-…").

    Returns:
        None, after one line in the log that says why, when there is nothing to watch: no GPU asked for, no
        driver, or a device that NVML cannot read (a MIG slice has no energy counter of its own).
    """
    if not uuids:
        logger.info("no GPU in use: utilisation, power and energy are not recorded")
        return None
    try:
        return _open(uuids)
    except Exception as error:  # NVML raises its own classes, and importing pynvml may fail as well
        logger.warning("utilisation, power and energy are not recorded: NVML says %s", error)
        return None


def cuda_uuids(count: int) -> list[str]:
    """NVML's names of the first `count` GPUs that this process sees (CUDA_VISIBLE_DEVICES counts)."""
    import torch

    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]


def nvml_state() -> str:
    """One line for people: the driver and its GPUs, or why NVML cannot be used."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:
        return f"not available: {error}"
    try:
        return f"driver {pynvml.nvmlSystemGetDriverVersion()}, {pynvml.nvmlDeviceGetCount()} GPUs"
    finally:
        pynvml.nvmlShutdown()


def _open(uuids: Sequence[str]) -> Watch:
    import pynvml

    pynvml.nvmlInit()
    try:
        started = Watch(pynvml, [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids])
        started.read()
    except Exception:
        pynvml.nvmlShutdown()
        raise
    return started


def _watts(nvml: Any, handle: Any) -> float:
    return float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3


class _CounterMeter:
    """Energy from the driver's counter (millijoules since the driver was loaded)."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._start = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._start) / 1e3

    def close(self) -> None:
        """Nothing runs."""


class PowerIntegral:
    """Energy as the integral of a power reading, for devices without a counter.

    Args:
        watts: reads the power now.
        clock: seconds, monotonic.
    """

    def __init__(self, watts: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._watts, self._clock = watts, clock
        self._joules = 0.0
        self._last = (clock(), watts())
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power-sampler", daemon=True)

    def start(self) -> "PowerIntegral":
        """Sample on a thread of its own until `close`."""
        self._thread.start()
        return self

    def sample(self) -> None:
        """Take one reading and add the trapezoid since the last one."""
        with self._lock:
            now, watts = self._clock(), self._watts()
            then, before = self._last
            self._joules += (now - then) * (watts + before) / 2
            self._last = (now, watts)

    def joules(self) -> float:
        self.sample()
        return self._joules

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():  # it must not read a device after NVML was shut down
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(POWER_SAMPLE_S):
            self.sample()


def _energy_meter(nvml: Any, handle: Any) -> "_CounterMeter | PowerIntegral":
    try:
        return _CounterMeter(nvml, handle)
    except nvml.NVMLError:
        logger.info("no energy counter on this GPU: its power is sampled every %.1f s", POWER_SAMPLE_S)
        return PowerIntegral(lambda: _watts(nvml, handle)).start()
