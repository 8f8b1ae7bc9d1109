"""Saving and loading the state of a run against PyTorch's own calls: 21M parameters, moments, averages.

The baseline is `async_save` and `load` of torch.distributed.checkpoint as they come. Ours writes the same
tensors, waits until the disk has them, hashes every file, and loads only what has the right hashes. What a
training step waits for is the first part of a save, a copy of the state: the stall.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.case import Case, Cost, Counted, Gate, Timed
from dtrain.checkpoint import CheckpointConfig, Checkpointer, Progress, TrainingState, choose_checkpoint
from dtrain.dist import process_group
from dtrain.ema import EMA, EMAConfig
from dtrain.local import local_part
from dtrain.mesh import MeshConfig, build_mesh
from dtrain.optim import OptimConfig, build_optimizer
from dtrain.parallelize import parallelize

WIDTH, LAYERS = 1024, 20
NUMBERS = WIDTH * (WIDTH + 1) * LAYERS
_COPIES = 4  # weights, two moments, averages


class Saving:
    """Saves and loads one state; calling it saves until all is written.

    Attributes:
        stalls_s: that `begin` took, of every save.
    """

    def __init__(self) -> None:
        if not dist.is_initialized():
            process_group().__enter__()  # until the process ends
        self.folder = Path(tempfile.mkdtemp(prefix="saving-"))
        self.state = _state(0)
        self.stalls_s: list[float] = []

    def __call__(self) -> None:
        start = time.perf_counter()
        self.begin()
        self.stalls_s.append(time.perf_counter() - start)
        self.finish()

    def begin(self) -> None:
        """What a step waits for."""
        raise NotImplementedError

    def finish(self) -> None:
        """Wait until all is written."""
        raise NotImplementedError

    def load(self, state: TrainingState) -> None:
        """Fill a state with what was saved."""
        raise NotImplementedError

    def __del__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Plain(Saving):
    """torch.distributed.checkpoint as it comes."""

    def begin(self) -> None:
        self._writing = async_save(self.state.tensors(), checkpoint_id=self.folder)

    def finish(self) -> None:
        self._writing.result()  # type: ignore[union-attr]

    def load(self, state: TrainingState) -> None:
        load(state.tensors(), checkpoint_id=self.folder)


class Ours(Saving):
    """dtrain's checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        config = CheckpointConfig(keep=1)
        self._saver = Checkpointer(self.folder, config, dist.new_group(backend="gloo"), is_main=True)

    def begin(self) -> None:
        self._saver.save(self.state, Progress(len(self.stalls_s), 0, 0, 1, ""))

    def finish(self) -> None:
        assert self._saver.wait()

    def load(self, state: TrainingState) -> None:
        found = choose_checkpoint(CheckpointConfig(), self.folder)
        assert found is not None
        state.load(found)


def _state(seed: int) -> TrainingState:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    parallelize(model, build_mesh(MeshConfig(), 1, "cpu"))
    optimizer = build_optimizer(model, OptimConfig())
    optimizer.make_state()
    return TrainingState(model, optimizer, EMA(model, EMAConfig()))


def _weights(state: TrainingState) -> list[Tensor]:
    return [local_part(parameter.detach()) for parameter in state.model.parameters()]


def wrong_numbers(work: Saving, _: Saving) -> float:
    """Weights that are others after a save and a load."""
    work()
    other = _state(1)
    work.load(other)
    pairs = zip(_weights(work.state), _weights(other), strict=True)
    return float(sum((a != b).sum() for a, b in pairs))


def stall_ms(work: Saving) -> float:
    return 1e3 * statistics.median(work.stalls_s)


def load_ms(work: Saving) -> float:
    """Median of five."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        work.load(work.state)
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


CASE = Case(
    name="save_checkpoint_cpu",
    title=f"checkpoint of {NUMBERS / 1e6:.0f}M parameters, moments and averages, fp32, one rank",
    baseline="plain PyTorch",
    contestants={"plain PyTorch": Plain, "dtrain": Ours},
    gates=(Gate("weights that are not what was saved", 0, wrong_numbers),),
    metrics=(
        Counted("stall_ms", "ms", stall_ms),
        Timed("save_ms"),
        Counted("load_ms", "ms", load_ms),
    ),
    cost=Cost(
        flops=0,
        bytes=2 * 2 * 4 * _COPIES * NUMBERS,
        reason="each number copied once and written once",
    ),
    rounds=9,
)
