"""The run log: what is read when, what is written, and what a resumed run keeps."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from dtrain.faults.tally import Tally
from dtrain.metrics import MetricsConfig, NullLog, RunLog
from dtrain.metrics.display import Display, duration, status
from dtrain.metrics.flops import mfu, peak_flops, training_flops
from dtrain.metrics.plot import loss_curve, smooth
from dtrain.metrics.records import drop_after, read_records

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def run_log(folder: Path, clock: Clock, log_every: int = 3, **arguments: int) -> RunLog:
    config = MetricsConfig(log_every=log_every, tensorboard=False, progress="none")
    settings = {"total_steps": 7, **arguments}
    return RunLog(config, folder, device=CPU, dtype=torch.float32, clock=clock, **settings)  # type: ignore[arg-type]


def test_records_hold_window_means(tmp_path: Path) -> None:
    clock = Clock()
    with run_log(tmp_path, clock) as log:
        for step in range(1, 8):
            clock.now += 0.5 * step
            log.step(step, samples=4, tokens=40, flops=1000, loss=torch.tensor(float(step)), lr=0.1)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 3, 6, 7]
    assert [r["loss"] for r in records] == [1.0, 3.0, 6.0, 7.0]
    assert [r["step_ms"] for r in records] == [500.0, 1250.0, 2500.0, 3500.0]
    assert records[1]["samples_per_s"] == 8 / 2.5
    assert records[1]["tokens_per_s"] == 80 / 2.5
    assert {r["mfu"] for r in records} == {None}
    assert all(r["memory_gib"] > 0 for r in records)


def test_tensors_are_read_only_when_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    item = Tensor.item
    monkeypatch.setattr(Tensor, "item", lambda self: reads.append(1) or item(self))
    with run_log(tmp_path, Clock()) as log:
        for step in range(1, 8):
            log._clock.now += 1  # type: ignore[attr-defined]
            log.step(step, samples=1, loss=torch.tensor(1.0), grad_norm=torch.tensor(2.0))
    assert len(reads) == 2 * 4


def test_all_ranks_agree_on_what_is_due(tmp_path: Path) -> None:
    null = NullLog(MetricsConfig(log_every=3), total_steps=7, resume_step=4)
    log = run_log(tmp_path, Clock(), resume_step=4)
    assert [s for s in range(5, 8) if null.due(s)] == [5, 6, 7]
    assert [null.due(s) for s in range(5, 8)] == [log.due(s) for s in range(5, 8)]
    with null as same:
        same.step(5, samples=1, loss=torch.tensor(float("nan")))
        same.tally(Tally({("a", "b")}))
        with same.untimed():
            same.note("nothing")
        assert same.summary() == {}


def test_untimed_work_is_not_step_time(tmp_path: Path) -> None:
    clock = Clock()
    with run_log(tmp_path, clock, log_every=1) as log:
        clock.now += 1
        with log.untimed():
            clock.now += 50
        clock.now += 1
        log.step(1, samples=1)
        assert log.summary()["wall_s"] == 52
    assert read_records(tmp_path / "metrics.jsonl")[0]["step_ms"] == 2000.0


def test_resume_drops_later_records_and_says_so(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "metrics.jsonl"
    with run_log(tmp_path, clock, log_every=1) as log:
        for step in range(1, 8):
            clock.now += 1
            log.step(step, samples=1, loss=float(step))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    with run_log(tmp_path, clock, log_every=1, resume_step=4) as log:
        for step in range(5, 8):
            clock.now += 1
            log.step(step, samples=1, loss=float(10 * step))
        assert log.summary()["steps"] == 3
    records = read_records(path)
    assert [(r["step"], r["loss"]) for r in records] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 50),
        (6, 60),
        (7, 70),
    ]
    assert "3 records after step 4 dropped" in path.read_text()


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"note": "old"}\n{"step": 1}\n{"step": 2}\n')
    assert drop_after(path, 0) == 2
    assert path.read_text() == ""
    assert drop_after(tmp_path / "absent.jsonl", 5) == 0


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    clock = Clock()
    with run_log(tmp_path, clock) as log:
        clock.now += 1
        log.step(1, samples=1, loss=torch.tensor(float("nan")), grad_norm=float("inf"))
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (record["loss"], record["grad_norm"]) == ("nan", "inf")
    assert json.loads((tmp_path / "summary.json").read_text())["final_loss"] == "nan"


def test_a_sharded_value_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        loss = DTensor.from_local(torch.ones(()), mesh, [Replicate()], run_check=False)
        with run_log(tmp_path, Clock()) as log, pytest.raises(TypeError, match="grad_norm is a DTensor"):
            log.step(1, samples=1, grad_norm=loss)
    finally:
        torch.distributed.destroy_process_group()


def test_summary_lists_skipped_files_once_and_leaves_out_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    config = MetricsConfig(log_every=1, tensorboard=False, progress="plain")
    with RunLog(config, tmp_path, total_steps=3, device=CPU, dtype=torch.float32, clock=clock) as log:
        for step, seconds in enumerate([60, 2, 4], start=1):
            clock.now += seconds
            log.step(step, samples=8, loss=1 / step)
        skipped = {("b.mp4", "no video stream"), ("a.mp4", "empty file"), ("a.mp4", "no video stream")}
        log.tally(Tally(skipped, worker_restarts=2, passed_over=1))
        log.note("path not taken")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["samples"], summary["wall_s"]) == (3, 24, 66)
    assert (summary["step_ms"], summary["samples_per_s"]) == (3000.0, 3.0)
    assert summary["energy_per_sample_joules"] is None
    assert summary["skipped"] == [
        {"source": "a.mp4", "reason": "empty file"},
        {"source": "b.mp4", "reason": "no video stream"},
    ]
    assert (summary["worker_restarts"], summary["updates_passed_over"], summary["rollbacks"]) == (2, 1, 0)
    shown = capsys.readouterr().out
    assert re.search(r"data workers restarted +│ +2", shown)
    assert "times gone back" not in shown
    assert "step 2/3  loss 0.5000  2000.0 ms/step  4.00 clips/s" in shown
    assert "note: path not taken" in shown
    assert shown.count("a.mp4: empty file") == 1
    assert "3000.0 ms" in shown


def test_a_failed_run_writes_no_summary(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), run_log(tmp_path, Clock()):
        raise RuntimeError("boom")
    assert not (tmp_path / "summary.json").exists()


def test_tensorboard_holds_every_record(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    clock = Clock()
    config = MetricsConfig(log_every=2, tensorboard=True, progress="none")
    with RunLog(config, tmp_path, total_steps=4, device=CPU, dtype=torch.float32, clock=clock) as log:
        for step in range(1, 5):
            clock.now += 1
            log.step(step, samples=1, loss=float(step))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (4, 4.0)]


def test_unknown_peak_is_said_once(tmp_path: Path) -> None:
    clock = Clock()
    with run_log(tmp_path, clock) as log:
        for step in range(1, 8):
            clock.now += 1
            log.step(step, samples=1, flops=1)
    assert (tmp_path / "metrics.jsonl").read_text().count("peak FLOP/s of cpu is not known") == 1


def test_log_every_is_checked() -> None:
    with pytest.raises(ValueError, match=r"metrics\.log_every = 0"):
        MetricsConfig(log_every=0)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5),
        ("NVIDIA H100 80GB HBM3", torch.float32, 67.0),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.5),
        ("NVIDIA H200", torch.float16, 989.5),
        ("NVIDIA H200 NVL", torch.bfloat16, 835.5),
        ("NVIDIA H20", torch.bfloat16, 148.0),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0),
        ("NVIDIA A10", torch.bfloat16, 125.0),
        ("NVIDIA L40S", torch.bfloat16, 362.0),
        ("NVIDIA L4", torch.bfloat16, 121.0),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA B200", torch.bfloat16, 2250.0),
        ("NVIDIA GB200", torch.bfloat16, 2500.0),
    ],
)
def test_known_peaks(name: str, dtype: torch.dtype, tflops: float) -> None:
    assert peak_flops(name, dtype) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
    ],
)
def test_unknown_peaks(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None


def test_tf32_has_its_own_peak() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float64) is None


def test_mfu() -> None:
    assert training_flops(10) == 30
    assert mfu(600.0, seconds=2.0, devices=3, peak=200.0) == 0.5
    assert mfu(None, 1.0, 1, 1.0) is None
    assert mfu(1.0, 1.0, 1, None) is None


def test_display_texts() -> None:
    assert duration(3725.4) == "1:02:05"
    record = {"loss": 0.5, "step_ms": 12.34, "samples_per_s": 3.0, "tokens_per_s": 12345.6, "mfu": 0.412}
    assert status(record) == "loss 0.5000  12.3 ms/step  3.00 clips/s  12,346 tokens/s  MFU 41.2%"


def test_bar_shows_the_figures_of_the_last_record() -> None:
    from rich.console import Console

    console = Console(force_terminal=True, record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    display = Display("auto", total=10, done=4, console=console)
    display.record({"step": 5, "loss": 0.25, "step_ms": 1.0, "memory_gib": 1.5})
    display.advance(5)
    display.note("a word [in] brackets")
    display.close()
    shown = console.export_text()
    assert "loss 0.2500" in shown
    assert "5/10" in shown
    assert "note: a word [in] brackets" in shown


def test_smoothing_is_unbiased() -> None:
    assert smooth([3.0] * 5, span=2.0) == pytest.approx([3.0] * 5)
    falling = smooth([4.0, 2.0, 1.0], span=1.0)
    assert falling[0] == 4.0
    assert falling == sorted(falling, reverse=True)


def test_loss_curve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import matplotlib.image

    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "loss": 10.0 / s} for s in range(1, 50)] + [
        {"note": "x"},
        {"step": 50, "loss": "nan"},
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = loss_curve(metrics, tmp_path / "deep" / "loss.png")
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape == (600, 1050, 4)
    assert len({tuple(p) for row in pixels[::10] for p in row}) > 10
    metrics.write_text('{"note": "x"}\n{"step": 1, "lo')
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="no record with a finite loss"):
        loss_curve(metrics, picture)
    assert "incomplete line" in caplog.text
