import pytest

from benchmarks.record import Device
from benchmarks.result import Floor, GateResult, Measurement, Ratio, Result


@pytest.fixture
def result() -> Result:
    def ms(*samples: float) -> Measurement:
        return Measurement(sorted(samples)[1], min(samples), max(samples), "ms", "lower", samples)

    def mib(value: int) -> Measurement:
        return Measurement(value * 2**20, value * 2**20, value * 2**20, "bytes", "lower", (value * 2.0**20,))

    return Result(
        schema_version=1,
        case="toy",
        title="A <toy> | step",
        baseline="plain",
        contestants={
            "plain": {"step_ms": ms(2000, 2100, 2050), "peak_bytes": mib(300)},
            "ours": {"step_ms": ms(1000, 1050, 1025), "peak_bytes": mib(200)},
        },
        ratios=(Ratio("ours", "step_ms", 2.0, 1.9, 2.1), Ratio("ours", "peak_bytes", 1.5, 1.5, 1.5)),
        gates=(GateResult("loss", "ours", True, 3e-7, 1e-5),),
        floor=Floor(10**12, 10**9, "a product", 2e12, 1e10, 500.0),
        device=Device("cpu", "A CPU", 2, 8 * 2**30),
        versions={"python": "3.11.9", "torch": "2.13.0", "triton": None, "cuda": None, "driver": None},
        threads=2,
        cpu_share=0.97,
        rounds=3,
        warmup=1,
        commit="0123456789abcdef0123456789abcdef01234567",
        dirty=False,
        date="2026-01-02T03:04:05+00:00",
        command="python -m benchmarks run toy",
    )
