"""The tiny DiT with faults: each is met by one rank as it trains on one sample, once in the life of a run.

    faults = ["kill 24", "nan 24 always"]

    kill 24         the rank that has sample 24 in a micro-batch is killed, once
    nan 24 always   its loss is not finite, whenever it is met

A file in `faulty.folder` remembers which have happened, whatever becomes of the process.
"""

import os
import resource
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.data import loader
from dtrain.recipe import Batch, DataState, Recipe
from dtrain.rng import SampleRNG
from dtrain.sharding.local import local_part
from tests.dtrain import tiny_dit

__all__ = ["recipe"]

_FOR_EVER_S = 3600.0
# Bytes that this rank's files may grow to: more is refused, as by a full disk.
_DISK = {"disk_fills": 1000, "disk_empties": resource.RLIM_INFINITY}


@dataclass(frozen=True)
class FaultyTable:
    faults: tuple[str, ...] = field(
        default=(), metadata={"help": 'Such as "kill 24" or, whenever it is met, "nan 24 always".'}
    )
    folder: str = field(default="", metadata={"help": "Where faults that have happened are remembered."})
    workers: int = field(default=0, metadata={"help": "Processes that read data."})
    stall_s: float = field(default=12.0, metadata={"help": "See dtrain.data.loader."})
    step_s: float = field(default=0.0, metadata={"help": "That every forward pass takes longer."})


@dataclass(frozen=True)
class Tables:
    model: tiny_dit.ModelTable = field(default_factory=tiny_dit.ModelTable)
    faulty: FaultyTable = field(default_factory=FaultyTable)


@dataclass(frozen=True)
class Faults:
    """What is to happen."""

    table: FaultyTable

    def due(self, indices: list[int]) -> list[str]:
        """Kinds that these samples bring, remembered before anything happens."""
        found = []
        for fault in self.table.faults:
            kind, sample, *always = fault.split()
            if int(sample) in indices and (self._first(f"{kind}-{sample}") or always):
                found.append(kind)
        return found

    def _first(self, name: str) -> bool:
        try:
            (Path(self.table.folder) / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class Reading:
    """The waves, read by workers that may not live."""

    def __init__(self, table: FaultyTable) -> None:
        kinds = ("worker_dies", "worker_hangs")
        self.faults = Faults(replace(table, faults=tuple(f for f in table.faults if f.split()[0] in kinds)))
        self.waves = tiny_dit.Waves()

    def __getitem__(self, index: int) -> dict[str, Any]:
        for kind in self.faults.due([index]):
            if kind == "worker_dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(_FOR_EVER_S)
        return self.waves[index]


def recipe(tables: Tables) -> Recipe:
    whole = tiny_dit.recipe(tiny_dit.TinyConfig(tables.model))
    table = tables.faulty
    mine = tuple(f for f in table.faults if not f.startswith("worker"))
    faults = Faults(replace(table, faults=mine))

    def loss(model: nn.Module, batch: Batch, rng: SampleRNG) -> Tensor:
        time.sleep(table.step_s)
        value = whole.loss(model, batch, rng)
        for kind in faults.due(batch["index"].tolist()):
            if kind == "flip":
                _flip_a_bit(model)
            value = _happen(kind, value)
        return value

    def data(rank: int, world: int, state: DataState) -> Any:
        return loader(
            Reading(table), rank, world, state,
            workers=table.workers, collate=tiny_dit.collate, stall_s=table.stall_s, restarts=2,
        )  # fmt: skip

    return replace(whole, loss=loss, data=data)


def _flip_a_bit(model: nn.Module) -> None:
    """Of one weight, on this rank alone."""
    weight = local_part(dict(model.named_parameters())["blocks.1.proj.weight"].detach())
    weight.view(-1).view(torch.int32)[:1] ^= 1 << 20  # updates would round a lower one away


def _happen(kind: str, loss: Tensor) -> Tensor:
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "stop": signal.SIGSTOP}
    if kind in signals:
        os.kill(os.getpid(), signals[kind])
    elif kind == "hang":
        time.sleep(_FOR_EVER_S)
    elif kind in _DISK:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_DISK[kind], resource.RLIM_INFINITY))
    elif kind == "huge":
        return loss * 1e4
    elif kind in ("nan", "inf"):
        return loss * float(kind)
    return loss
