"""Result files of runs into which faults were injected, and the tables of docs/reliability.md.

benchmarks:faults   results/faults/faults.json   each fault alone, `python -m tests.faults.table`
benchmarks:soak     results/faults/soak.json     a long run that meets many, `python -m tests.faults.soak`
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.record import Measured, read_record
from benchmarks.text import table_row

__all__ = [
    "VERSION",
    "FaultRuns",
    "Life",
    "Met",
    "Soak",
    "fault_table",
    "read_faults",
    "read_soak",
    "soak_table",
]

VERSION = 1


@dataclass(frozen=True)
class Met:
    """A fault that a test injected, and what came of it; its assertions held."""

    fault: str = field(metadata={"help": "what was injected"})
    outcome: str = field(metadata={"help": "what happened"})
    steps_lost: int | None = field(metadata={"help": "that were trained again; null where the run ended"})
    seconds: float | None = field(
        metadata={"help": "from the fault to the end of the step that it broke, or of the run; null: not met"}
    )
    same_weights: bool | None = field(
        metadata={"help": "as the undisturbed run's, bit for bit; null where other samples were trained on"}
    )


@dataclass(frozen=True, kw_only=True)
class FaultRuns(Measured):
    """Of every kind of fault, one run."""

    schema_version: int = field(default=VERSION, metadata={"help": "of this format"})
    met: tuple[Met, ...] = field(metadata={"help": "in the order of the tests"})


@dataclass(frozen=True)
class Life:
    """From a start of torchrun to its end."""

    began: int = field(metadata={"help": "step of the checkpoint that it went on from"})
    ended: int = field(metadata={"help": "last step that it took"})
    faults: tuple[str, ...] = field(metadata={"help": "kind and sample; the last ended it"})
    exit_status: int = field(metadata={"help": "of torchrun"})
    damaged: str = field(metadata={"help": "what was done to the newest checkpoint before, if anything"})
    seconds: float = field(metadata={"help": "that it took"})
    lost: int = field(metadata={"help": "steps of the life before that it trained again"})


@dataclass(frozen=True, kw_only=True)
class Soak(Measured):
    """A run that met a fault every few steps, and ended with the weights of one that met none."""

    schema_version: int = field(default=VERSION, metadata={"help": "of this format"})
    steps: int = field(metadata={"help": "of the run"})
    ranks: int = field(metadata={"help": "processes"})
    passed_over: int = field(metadata={"help": "updates that were not finite, the same in both runs"})
    lives: tuple[Life, ...] = field(metadata={"help": "in order"})
    compared: int = field(metadata={"help": "tensors of the last checkpoints, equal bit for bit"})
    undisturbed_s: float = field(metadata={"help": "seconds of the run without faults"})


def read_faults(path: Path) -> FaultRuns:
    """A file of `tests.faults.table`; ValueError names its first fault."""
    return read_record(FaultRuns, path, VERSION)


def read_soak(path: Path) -> Soak:
    """A file of `tests.faults.soak`; ValueError names its first fault."""
    return read_record(Soak, path, VERSION)


def fault_table(runs: FaultRuns) -> Iterator[str]:
    """Markdown, a row a fault."""
    yield table_row(["fault", "what happened", "steps trained again", "seconds", "weights at the end"])
    yield table_row(["---", "---", "---:", "---:", "---"])
    same = {True: "equal, bit for bit", False: "others", None: ""}
    for met in runs.met:
        lost = "" if met.steps_lost is None else str(met.steps_lost)
        seconds = "" if met.seconds is None else f"{met.seconds:.1f}"
        yield table_row([met.fault, met.outcome, lost, seconds, same[met.same_weights]])


def soak_table(soak: Soak) -> Iterator[str]:
    """Markdown: what a soak met, and what it cost."""
    kinds = Counter(fault.split("-")[0] for life in soak.lives for fault in life.faults)
    damaged = sum(bool(life.damaged) for life in soak.lives)
    names = {"kill": "killed", "term": "SIGTERM", "hang": "hung", "stop": "stopped"}
    rows = [
        ("steps", f"{soak.steps:,}"),
        (
            "rank " + ", ".join(names[kind] for kind in sorted(kinds)),
            ", ".join(str(kinds[k]) for k in sorted(kinds)),
        ),
        ("newest checkpoint damaged", str(damaged)),
        ("updates passed over", str(soak.passed_over)),
        ("starts of torchrun", str(len(soak.lives))),
        ("steps trained again", str(sum(life.lost for life in soak.lives))),
        (
            "wall time",
            f"{sum(life.seconds for life in soak.lives):.0f} s, undisturbed {soak.undisturbed_s:.0f} s",
        ),
        ("tensors equal at the end, bit for bit", f"{soak.compared} of {soak.compared}"),
    ]
    yield table_row(["a soak", ""])
    yield table_row(["---", "---:"])
    yield from map(table_row, rows)
