"""What a run tells about itself: a progress bar, metrics.jsonl, TensorBoard and a summary.

Losses and norms stay on the device until a step that is logged: reading a CUDA tensor waits for the GPU, and
doing that every step would stop the host from running ahead. Times are therefore means over the steps since
the last logged one; the first step (compilation, the first batch) is a window of its own.

A line of metrics.jsonl is one JSON object: `step`, the values that the trainer passed (`loss`, `grad_norm`,
`lr`, …), and `step_ms`, `samples_per_s`, `tokens_per_s`, `mfu`, `memory_gib`; null where unknown. Lines with
a `note` instead tell of paths that were not taken. No disk that refuses them ends a run, see `records`.
"""

import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtrain.faults.tally import Tally
from dtrain.metrics import flops, telemetry
from dtrain.metrics.display import Display, show_summary
from dtrain.metrics.records import Record, RecordFile, disk_faults_said, drop_after, to_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricsConfig:
    """What is recorded, and how often."""

    log_every: int = field(
        default=10, metadata={"help": "Steps between records; device values are read on the host only then."}
    )
    tensorboard: bool = field(
        default=True, metadata={"help": "Write TensorBoard files into the run's folder tensorboard/."}
    )
    progress: Literal["auto", "bar", "plain", "none"] = field(
        default="auto",
        metadata={
            "help": "bar: a live bar. plain: one line per record. auto: bar on a terminal, else plain."
        },
    )

    predict_memory: Literal["auto", "always", "never"] = field(
        default="auto",
        metadata={
            "help": "Plan rank 0's peak in a process beside the run, and say it beside what was taken. "
            "auto: on GPUs; on a CPU the planner would take cores from the ranks."
        },
    )

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"metrics.log_every = {self.log_every}: must be 1 step or more.")


class NullLog:
    """The log of the ranks that write nothing: RunLog's methods, without effect.

    Args:
        config: all ranks' `MetricsConfig`.
        total_steps: the step after which the run ends.
        resume_step: steps already done, 0 in a fresh run.
    """

    def __init__(self, config: MetricsConfig, *, total_steps: int, resume_step: int = 0) -> None:
        self.config = config
        self.total_steps = total_steps
        self.resume_step = resume_step

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def due(self, step: int) -> bool:
        """Whether this step (counted from 1) is recorded; the same on every rank."""
        return step in (self.resume_step + 1, self.total_steps) or step % self.config.log_every == 0

    def step(
        self,
        step: int,
        *,
        samples: int,
        tokens: int | None = None,
        flops: int | None = None,
        **values: Tensor | float,
    ) -> None:
        """Tell that a step is done.

        Args:
            step: its number, counted from 1.
            samples, tokens: that it trained on, over all ranks.
            flops: its training FLOPs over all ranks, see `dtrain.metrics.flops.training_flops`.
            **values: scalars (`loss=…`), already reduced over the ranks; read only if the step is `due`.
        """

    def note(self, text: str) -> None:
        """Say something once, on the screen and in the run's metrics (a path that is not taken)."""

    def tally(self, met: Tally) -> None:
        """Put what the run met, of all ranks, into the summary; of a source the first reason counts."""

    def memory(self, values: dict[str, Any]) -> None:
        """Put what was planned and taken, see `dtrain.metrics.memory`, into the summary."""

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Time spent inside (sampling, saving) does not count as step time."""
        yield

    def summary(self) -> dict[str, Any]:
        """The run so far, in figures; empty on ranks that record nothing."""
        return {}


@dataclass
class _Window:
    """Work since the last record."""

    start: float
    steps: int = 0
    samples: int = 0
    tokens: int | None = 0
    flops: int | None = 0


class RunLog(NullLog):
    """Records a run; for rank 0. Use as a context manager: a clean exit writes summary.json and shows it.

    Args:
        config: see `MetricsConfig`.
        folder: the run's folder; metrics.jsonl of an earlier part of the run is continued.
        total_steps: the step after which the run ends.
        resume_step: steps already done. Records of later steps are dropped: they will be made again.
        device: where the run computes; its name gives the peak for MFU.
        dtype: of the matrix products, for the peak.
        world: number of ranks, one device each.
        local_world: ranks on this host, whose GPUs' energy can be read; scaled by world / local_world.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: MetricsConfig,
        folder: Path,
        *,
        total_steps: int,
        resume_step: int = 0,
        device: torch.device,
        dtype: torch.dtype,
        world: int = 1,
        local_world: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(config, total_steps=total_steps, resume_step=resume_step)
        self.folder, self.device, self.world, self.local_world = folder, device, world, local_world
        self._clock = clock
        self._peak = flops.peak_flops(_device_name(device), dtype)
        self._records: list[Record] = []
        self._met = Tally()
        self._samples = 0
        self._memory: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        dropped = drop_after(self.path, self.resume_step)
        self._lines = RecordFile(self.path)
        self._board = _board(self.folder, self.resume_step) if self.config.tensorboard else None
        self._display = Display(self.config.progress, self.total_steps, self.resume_step)
        uuids = telemetry.cuda_uuids(self.local_world) if self.device.type == "cuda" else []
        self._watch = telemetry.watch(uuids)
        if dropped:
            self.note(f"{dropped} records after step {self.resume_step} dropped from {self.path.name}")
        if self._peak is None:
            self.note(f"MFU is not recorded: the peak FLOP/s of {_device_name(self.device)} is not known")
        self._began = self._clock()
        self._window = _Window(self._began)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.close()
        if error is None:
            summary, file = self.summary(), self.folder / "summary.json"
            with disk_faults_said(str(file)):
                file.write_text(to_json(summary, indent=2) + "\n")
            if self.config.progress != "none":
                show_summary(summary)
        if self._watch is not None:
            self._watch.close()
        if self._board is not None:
            with disk_faults_said("TensorBoard's last records"):
                self._board.close()
        self._lines.close()

    @property
    def path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def step(
        self,
        step: int,
        *,
        samples: int,
        tokens: int | None = None,
        flops: int | None = None,
        **values: Tensor | float,
    ) -> None:
        window = self._window
        window.steps += 1
        window.samples += samples
        window.tokens = None if tokens is None or window.tokens is None else window.tokens + tokens
        window.flops = None if flops is None or window.flops is None else window.flops + flops
        self._samples += samples
        if self.due(step):
            # Reading the values waits for the device, so the clock is read after them.
            scalars = {name: _scalar(name, value) for name, value in values.items()}
            self._record({"step": step} | scalars | self._rates(self._clock() - window.start))
            self._window = _Window(self._clock())
        self._display.advance(step)

    def note(self, text: str) -> None:
        self._display.note(text)
        self._lines.write({"note": text})

    def tally(self, met: Tally) -> None:
        self._met = met

    def memory(self, values: dict[str, Any]) -> None:
        self._memory = values

    @contextmanager
    def untimed(self) -> Iterator[None]:
        start = self._clock()
        yield
        self._window.start += self._clock() - start

    def summary(self) -> dict[str, Any]:
        """The part of the run since its start or resumption.

        Rates are medians over the records without the first step, which compiles and warms up; energy is that
        of everything, sampling and saving too, and null where NVML cannot read it.
        """
        steady = self._records[1:] or self._records
        last = self._records[-1] if self._records else {}
        energy = self._energy_joules()
        skipped = dict(sorted(self._met.skipped, reverse=True))  # one reason a source
        return {
            "steps": last.get("step", self.resume_step) - self.resume_step,
            "samples": self._samples,
            "wall_s": self._clock() - self._began,
            "step_ms": _median(steady, "step_ms"),
            "samples_per_s": _median(steady, "samples_per_s"),
            "tokens_per_s": _median(steady, "tokens_per_s"),
            "mfu": _median(steady, "mfu"),
            "final_loss": last.get("loss"),
            "peak_memory_gib": max((r["memory_gib"] for r in self._records), default=None),
            "memory": self._memory,
            "energy_per_sample_joules": energy / self._samples if energy and self._samples else None,
            "worker_restarts": self._met.worker_restarts,
            "updates_passed_over": self._met.passed_over,
            "rollbacks": self._met.rollbacks,
            "failed_saves": self._met.failed_saves,
            "skipped": [{"source": source, "reason": reason} for source, reason in sorted(skipped.items())],
        }

    def _rates(self, seconds: float) -> Record:
        window = self._window
        rates: Record = {
            "step_ms": seconds / window.steps * 1e3,
            "samples_per_s": window.samples / seconds,
            "tokens_per_s": window.tokens / seconds if window.tokens is not None else None,
            "mfu": flops.mfu(window.flops, seconds, self.world, self._peak)
            if window.flops is not None
            else None,
            "memory_gib": peak_memory_gib(self.device),
        }
        if self._watch is not None:
            now = self._watch.read()
            rates |= {"gpu_utilisation": now.utilisation, "gpu_power_watts": now.power_watts}
        return rates

    def _record(self, record: Record) -> None:
        self._records.append(record)
        self._lines.write(record)
        self._display.record(record)
        if self._board is not None:
            self._draw(self._board, record)

    def _draw(self, board: Any, record: Record) -> None:
        try:
            for name, value in record.items():
                if name != "step" and value is not None:
                    board.add_scalar(name, value, record["step"])
        except OSError as error:  # its thread is gone with it
            self._board = None
            self.note(f"TensorBoard files end here: {error}; {self.path.name} has every record")

    def _energy_joules(self) -> float | None:
        if self._watch is None:
            return None
        return self._watch.read().energy_joules * self.world / self.local_world


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on a CUDA device, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1024**3
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1024**3


def _scalar(name: str, value: Tensor | float) -> float:
    if isinstance(value, DTensor):
        raise TypeError(f"{name} is a DTensor: reduce it over the ranks before it is logged")
    return value.item() if isinstance(value, Tensor) else value


def _median(records: list[Record], name: str) -> float | None:
    values = [record[name] for record in records if record[name] is not None]
    return statistics.median(values) if values else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _board(folder: Path, resume_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
