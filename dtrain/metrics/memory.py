"""What memory a run was planned to take, beside what it took.

Rank 0 starts the planner (`dtrain.plan.predict`) when the run begins, and no step waits for its answer. What
was taken is the peak of CUDA's allocator over the whole run, sampling and saving included, on the rank that
took most. A CPU's allocator counts nothing, so there it is not measured.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from dtrain.config import RunConfig
from dtrain.dist import World
from dtrain.kernels.launch import arch_of
from dtrain.metrics.log import NullLog

__all__ = ["MemoryReport", "Predicted", "Prediction"]

_PATIENCE_S = 120.0  # at the end of a run that was shorter than its plan
_GIB = 2**30
# A rank's place and its GPUs: the planner is no rank.
_HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_ALONE = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Predicted(NamedTuple):
    """What the planner answered."""

    peak_bytes: int | None
    """Of rank 0; None where the run cannot be planned."""
    said: Sequence[str]
    """When that is and what was planned without, or why there is none."""


class Prediction:
    """A planner at work, until `close`.

    Args:
        config: a run's config file.
        ranks: of the run.
        arch: of its GPUs, such as "sm_90"; "" on CPU ranks.
        out: file for the answer; what the planner prints is beside it, in a .log.
        sets: overrides of the config.
    """

    def __init__(self, config: Path, ranks: int, arch: str, out: Path, sets: Sequence[str] = ()) -> None:
        self._out, self._log = out, out.with_suffix(".log")
        out.unlink(missing_ok=True)  # of an earlier part of the run
        arguments = map(str, (config, ranks, arch, out, *sets))
        environment = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dtrain.plan.predict", *arguments],
                env=environment | _ALONE,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def read(self, patience_s: float = 0.0) -> Predicted | None:
        """The answer; None where there is none yet, for as long as one may wait."""
        try:
            code = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            return None
        if not self._out.exists():
            return Predicted(None, (f"the planner ended with status {code} and no answer, see {self._log}",))
        answer = json.loads(self._out.read_text("utf-8"))
        return Predicted(answer["peak_bytes"], answer["said"])

    def close(self) -> None:
        """End the planner, whether or not it is done."""
        self._process.kill()
        self._process.wait()


class MemoryReport:
    """Says on rank 0 what was planned, once, and at the end what all ranks took.

    Use as a context manager, around the run.

    Args:
        config: of the run; `metrics.predict_memory` says whether it is planned.
        world: this rank's place.
        preset: of the collectives that are in use, where `comm.preset` leaves the choice to the run.
    """

    def __init__(self, config: RunConfig, world: World, preset: str) -> None:
        self._world = world
        self._patience_s = min(_PATIENCE_S, config.train.timeout_s / 2)  # the others wait meanwhile
        self._prediction: Prediction | None = None
        self._planned_bytes: int | None = None
        wanted = config.metrics.predict_memory
        on_gpu = world.device.type == "cuda"
        if world.is_main and (wanted == "always" or (wanted == "auto" and on_gpu)):
            self._prediction = Prediction(
                config.run_dir / "config.toml",
                world.size,
                arch_of(world.device) if on_gpu else "",
                config.run_dir / "memory.json",
                [f"comm.preset={preset}"] if config.comm.preset == "auto" else [],
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._prediction is not None:
            self._prediction.close()

    def poll(self, log: NullLog, patience_s: float = 0.0) -> None:
        """Say what the planner answered, when it has."""
        if self._prediction is None or (answer := self._prediction.read(patience_s)) is None:
            return
        self._prediction.close()
        self._prediction = None
        self._planned_bytes, said = answer.peak_bytes, "; ".join(answer.said)
        if self._planned_bytes is None:
            log.note(f"memory of rank 0 is not planned: {said}")
        else:
            log.note(f"memory of rank 0, planned peak: {_gib(self._planned_bytes)} ({said})")

    def finish(self, log: NullLog) -> None:
        """Say what was taken, beside what was planned. All ranks call it."""
        taken = _taken(self._world)
        self.poll(log, self._patience_s)
        if self._prediction is not None:
            log.note(f"memory of rank 0 is not planned: {self._patience_s:.0f} s more than the run do not do")
        planned = self._planned_bytes
        log.memory({"planned_gib": planned / _GIB if planned else None} | taken)
        if taken or planned:
            log.note(_beside(taken, planned))


def _beside(taken: dict[str, Any], planned: int | None) -> str:
    """What was taken and what was planned, in words."""
    words = "memory, peak of the run: not measured on the CPU"
    if taken:
        words = (
            f"memory, peak of the run: {taken['allocated_gib']:.3f} GiB allocated (rank "
            f"{taken['allocated_rank']}), {taken['reserved_gib']:.3f} reserved (rank "
            f"{taken['reserved_rank']})"
        )
    if planned is None:
        return words
    share = f", {planned / _GIB / taken['allocated_gib']:.1%} of that" if taken else ""
    return f"{words}; planned {_gib(planned)}{share}"


def _taken(world: World) -> dict[str, Any]:
    """The largest peaks over all ranks, and whose they are; nothing on the CPU."""
    if world.device.type != "cuda":
        return {}
    mine = torch.cuda.max_memory_allocated(world.device), torch.cuda.max_memory_reserved(world.device)
    everyone = [mine] * world.size
    dist.all_gather_object(everyone, mine)
    taken: dict[str, Any] = {}
    for i, name in enumerate(("allocated", "reserved")):
        rank = max(range(world.size), key=lambda r, i=i: everyone[r][i])  # type: ignore[misc]
        taken |= {f"{name}_gib": everyone[rank][i] / _GIB, f"{name}_rank": rank}
    return taken


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.3f} GiB"
