"""A process for one task: it imports, waits for the task on standard input, does it, and prints the answer.

So a rung has a process of its own, with an allocator that nothing was taken from before, and does not wait
for imports: the next process is started while this one measures.
"""

import json
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks.environment import ROOT, describe_device, seconds
from benchmarks.ladder.gate import check
from benchmarks.ladder.rungs import RUNGS
from benchmarks.ladder.training import Training, start
from benchmarks.ladder.workloads import WORKLOADS, tiny
from benchmarks.memory import peak_bytes
from dtrain.kernels.launch import arch_of
from dtrain.plan.fake import alone

__all__ = ["Answer", "Workers", "describe"]

_STEPS = {"cuda": 3, "cpu": 1}  # timed
_LONG_S = 10.0  # none begins when those before took longer
Answer = dict[str, Any]


class Workers:
    """Processes, one a task, the next one always ready."""

    def __init__(self) -> None:
        self._next = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._next.communicate("")  # no task: it ends

    def ask(self, task: str, **arguments: Any) -> Answer:
        """Do one task in a process of its own: what it answers, or {"failed": why}."""
        process, self._next = self._next, self._start()
        said, _ = process.communicate(json.dumps({"task": task, **arguments}))
        if process.returncode:
            return {"failed": f"its process ended with exit code {process.returncode}"}
        answer: Answer = json.loads(said.splitlines()[-1])
        return answer

    @staticmethod
    def _start() -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "benchmarks.ladder.worker"]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def describe(kind: Any) -> Answer:
    """The device, and the architecture to plan for; "" is a CPU's."""
    arch = arch_of(torch.device(kind)) if kind == "cuda" else ""
    return {"device": asdict(describe_device(kind)), "arch": arch}


def gate(workload: str, rungs: list[str], kind: str) -> Answer:
    """Gates of a workload's rungs."""
    return {"gates": [asdict(one) for one in check(tiny(WORKLOADS[workload]), rungs, torch.device(kind))]}


def measure(workload: str, rung: str, world: int, kind: str, small: bool) -> Answer:
    """Memory and steps of one rung, as rank 0 of a fake process group."""
    device = torch.device(kind)
    chosen = tiny(WORKLOADS[workload]) if small else WORKLOADS[workload]
    with alone(world):
        try:
            training = start(chosen, RUNGS[rung], world, device)
            return _on_cuda(training) if kind == "cuda" else _on_cpu(training)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            return {"oom": _asked(error)}


def _on_cuda(training: Training) -> Answer:
    torch.cuda.empty_cache()
    training.step()  # compiles kernels, and makes buffers that stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    steps = _timed(training, "cuda")
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "steps_s": steps,
    }


def _on_cpu(training: Training) -> Answer:
    training.step()
    steps = _timed(training, "cpu")
    allocated = training.held_bytes + peak_bytes(training.gradients)
    return {"allocated_bytes": allocated, "reserved_bytes": None, "steps_s": steps}


def _timed(training: Training, kind: str) -> list[float]:
    taken: list[float] = []
    while len(taken) < _STEPS[kind] and sum(taken) < _LONG_S:
        taken.append(seconds(training.step, kind))
    return taken


def _asked(error: RuntimeError) -> str:
    """What it asked for as the memory ran out, and beside what."""
    found = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    asked = f"asked for {found[1]}" if found else str(error).partition("\n")[0]
    return f"{asked} beside {torch.cuda.memory_allocated() / 2**30:.1f} GiB"


_TASKS: dict[str, Callable[..., Answer]] = {"describe": describe, "gate": gate, "measure": measure}


def main() -> int:
    """Take one task from standard input, or none."""
    torch.set_num_threads(1)  # a GPU needs no more, and a rehearsal shares its machine
    line = sys.stdin.read()
    if not line:
        return 0
    arguments = json.loads(line)
    try:
        answer = _TASKS[arguments.pop("task")](**arguments)
    except Exception as error:  # the other rungs are measured all the same
        traceback.print_exc()
        answer = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
