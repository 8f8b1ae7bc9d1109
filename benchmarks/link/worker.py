"""One host's part of the measurement; torchrun starts it in every host.

All variants live side by side, begin with the same weights, and take turns: a round runs each once, every
other round in reverse order, so that drifts of the machine hit all alike. A step is timed from one barrier to
the next, that is, until the slowest host has its new weights; bytes are read from the interface between the
same barriers, headers and acknowledgements included.
"""

import gc
import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import uvit
from benchmarks.link.hosts import INTERFACE
from benchmarks.link.records import RankRecord, Record
from benchmarks.link.workload import Job, Workload, how
from benchmarks.schema import decode
from dtrain.comm import CommConfig, attached
from dtrain.dist import World, process_group
from dtrain.optim import AdamW
from dtrain.parallelize import ParallelConfig, parallelize
from dtrain.sharding.init import fill_parameters
from dtrain.sharding.mesh import MeshConfig, build_mesh
from dtrain.sharding.shard import ShardConfig

__all__ = ["main"]

log = logging.getLogger(__name__)

_LEARNING_RATE = 1e-4


class Trainee:
    """One variant: a sharded model, its optimizer, its collectives."""

    def __init__(self, variant: str, workload: Workload, source: "Trainee | None") -> None:
        preset, reduce_dtype = how(variant)
        self.variant = variant
        config = ParallelConfig(shard=ShardConfig("bfloat16", reduce_dtype), comm=CommConfig(preset))
        self.model, self.parameters = _sharded(workload, config, source)
        comm = attached(self.model)
        assert comm is not None
        self.comm = None if preset == "none" else comm
        self.optimizer = AdamW(self.model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95))
        self.record = Record(comm.preset, said=tuple(comm.said))

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Train on the batch once; returns this rank's loss."""
        noisy, timesteps, target = batch
        loss = F.mse_loss(self.model(noisy, timesteps).float(), target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # here, so that no variant's gradients lie about while others run
        return loss.detach()


def _sharded(workload: Workload, config: ParallelConfig, source: Trainee | None) -> tuple[nn.Module, int]:
    """A model with the weights that `source` has, or fresh ones; and how many parameters it has."""
    with torch.device("meta"):
        model = uvit.build(workload.config)
    count = sum(p.numel() for p in model.parameters())
    mesh = build_mesh(MeshConfig(), dist.get_world_size(), "cpu")
    parallelize(model, mesh, config).to_empty(device="cpu")
    if source is None:
        fill_parameters(model, uvit.initializer(model), seed=0)
    else:
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), source.model.parameters(), strict=True):
                assert isinstance(mine, DTensor)
                assert isinstance(theirs, DTensor)
                mine.to_local().copy_(theirs.to_local())
    return model, count


def _batch(workload: Workload, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed noise to be turned into fixed noise: the loss falls, and no data is read."""
    generator = torch.Generator().manual_seed(1 + rank)
    shape = (workload.batch, 4, workload.side, workload.side)
    noisy, target = (torch.randn(shape, generator=generator) for _ in range(2))
    return noisy, torch.arange(workload.batch) * 100.0 + rank, target


def _sent_bytes() -> int:
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


@contextmanager
def _observed(trainee: Trainee) -> Iterator[list[Tensor]]:
    """Note what a step takes; the caller puts the loss in the list."""
    record, losses = trainee.record, list[Tensor]()
    gc.collect()
    if trainee.comm is not None:
        trainee.comm.meter.read()
    dist.barrier()
    sent, faults = _sent_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cpu, begun = time.process_time(), time.perf_counter()
    yield losses
    cpu = time.process_time() - cpu
    dist.barrier()
    record.step_s += (time.perf_counter() - begun,)
    record.sent_bytes += (_sent_bytes() - sent,)
    record.cpu_s += (cpu,)
    record.page_faults += (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,)
    record.losses += (float(losses[0]),)
    if trainee.comm is not None:
        record.meter_bytes += (trainee.comm.meter.read()["wire_mib"] * 2**20,)


def _measure(job: Job, world: World) -> RankRecord:
    trainees: list[Trainee] = []
    for variant in job.variants:
        trainees.append(Trainee(variant, job.workload, trainees[0] if trainees else None))
        log.info("%s: built", variant)
    batch = _batch(job.workload, world.rank)
    begun = time.perf_counter()
    for trainee in trainees:
        trainee.step(batch)
        dist.barrier()
    rounds = _rounds(job, time.perf_counter() - begun)
    for index in range(rounds):
        for trainee in trainees[:: -1 if index % 2 else 1]:
            with _observed(trainee) as losses:
                losses.append(trainee.step(batch))
            log.info("%s: step %d, %.3f s", trainee.variant, index, trainee.record.step_s[-1])
    if job.sampled:
        for trainee in trainees:
            _sample(trainee, batch)
    if job.profile:
        for trainee in trainees:
            _profile(trainee, batch, world, Path(job.out))
    return RankRecord(trainees[0].parameters, {t.variant: t.record for t in trainees})


def _rounds(job: Job, warmup_s: float) -> int:
    """How many rounds fit, by the time of the warm-up; as rank 0 sees it."""
    rounds = torch.tensor(min(job.most_rounds, max(job.least_rounds, int(job.seconds / warmup_s))))
    dist.broadcast(rounds, 0)
    return int(rounds)


def _sample(trainee: Trainee, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """One step more, untimed, of which the meter takes errors and codec times."""
    if trainee.comm is None:
        return
    meter = trainee.comm.meter
    meter.read()
    meter.sample = True
    trainee.step(batch)
    meter.sample = False
    trainee.record.sampled = meter.read()
    dist.barrier()


def _profile(trainee: Trainee, batch: tuple[Tensor, Tensor, Tensor], world: World, out: Path) -> None:
    """Which operators take rank 0's time in a step."""
    begun = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainee.step(batch)
        taken = time.perf_counter() - begun
    dist.barrier()
    if world.is_main:
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        (out / f"profile-{trainee.variant}.txt").write_text(f"{taken:.3f} s\n{table}\n")


def main(job_file: str) -> None:
    """Measure what the file says; write this rank's record beside it."""
    job: Job = decode(Job, json.loads(Path(job_file).read_text()))
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s: %(message)s")
    torch.set_num_threads(1)
    with process_group() as world:
        record = _measure(job, world)
        (Path(job.out) / f"rank{world.rank}.json").write_text(json.dumps(asdict(record)))


if __name__ == "__main__":
    main(sys.argv[1])
