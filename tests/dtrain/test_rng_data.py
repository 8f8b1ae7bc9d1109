"""Draws and positions belong to samples: not to ranks, batches or the point where a run was resumed."""

import gc
import multiprocessing
import os
import signal
import time
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dtrain.data import epoch_of, loader, micro_batch_indices
from dtrain.recipe import DataState
from dtrain.rng import SampleRNG, derive_seed, seed_everything
from dtrain.sharding.init import copy_full, fill_parameters


class Squares:
    def __init__(self, slow_s: float = 0.0) -> None:
        self.slow_s = slow_s

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.slow_s)
        return {"index": index, "square": index**2}


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([sample[key] for sample in samples]) for key in ("index", "square")}


def taken(ranks: int, start: int, micro_batch: int, micro_steps: int) -> list[int]:
    """Global indices that all ranks together read, micro-step by micro-step and in rank order."""
    state = DataState(seed=0, sample=start, micro_batch=micro_batch)
    streams = [micro_batch_indices(rank, ranks, state) for rank in range(ranks)]
    return [index for _ in range(micro_steps) for stream in streams for index in next(stream)]


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "micro_steps"), [(1, 12, 1), (2, 3, 2), (3, 4, 1), (4, 1, 3)]
)
def test_a_step_reads_the_same_samples_on_any_world(ranks: int, micro_batch: int, micro_steps: int) -> None:
    assert taken(ranks, 24, micro_batch, micro_steps) == list(range(24, 36))


def test_no_sample_is_lost_or_repeated_when_the_world_changes() -> None:
    before = taken(4, 0, 2, 3)
    after = taken(3, len(before), 2, 4)
    assert before + after == list(range(48))


def test_epoch_of() -> None:
    assert [epoch_of(i, 3) for i in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_the_order(workers: int) -> None:
    state = DataState(seed=0, sample=8, micro_batch=2)
    batches = islice(loader(Squares(), 1, 2, state, workers=workers, collate=collate), 3)
    assert [batch["square"].tolist() for batch in batches] == [[100, 121], [196, 225], [324, 361]]


def test_workers_outlive_signals_that_stop_a_run() -> None:
    """Ctrl-C and a scheduler's SIGTERM reach them too, while the run still finishes its step."""
    reading = loader(Squares(), 0, 1, DataState(0, 0, 2), workers=2, collate=collate)
    batches = iter(reading)
    first = [index for batch in islice(batches, 4) for index in batch["index"].tolist()]  # of both
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    rest = [index for batch in islice(batches, 20) for index in batch["index"].tolist()]
    assert first + rest == list(range(48))
    assert reading.restarted == 0


@pytest.mark.parametrize("slow_s", [0.0, 0.3], ids=["with batches ready", "while it reads"])
def test_a_worker_that_dies_inside_a_lock_holds_nobody_up(slow_s: float) -> None:
    """The lock is that of the event by which PyTorch tells workers to end."""
    reading = loader(Squares(slow_s), 0, 1, DataState(0, 0, 2), workers=1, collate=collate)
    batches = iter(reading)
    first = next(batches)["index"].tolist()
    [workers] = [o for o in gc.get_objects() if type(o) is _MultiProcessingDataLoaderIter]
    workers._workers_done_event._event._cond.acquire()
    workers._workers[0].kill()
    rest = [index for batch in islice(batches, 6) for index in batch["index"].tolist()]
    assert first + rest == list(range(14))
    assert reading.restarted == 1


def test_draws_do_not_depend_on_the_batch() -> None:
    whole = SampleRNG(7, torch.tensor([3, 4, 5]))
    alone = SampleRNG(7, [4])
    assert torch.equal(whole.normal("noise", (2, 3))[1], alone.normal("noise", (2, 3))[0])
    assert torch.equal(whole.uniform("time")[1], alone.uniform("time")[0])


@pytest.mark.parametrize("other", [SampleRNG(8, [3]), SampleRNG(7, [2])])
def test_draws_depend_on_seed_and_sample(other: SampleRNG) -> None:
    mine = SampleRNG(7, [3]).normal("noise", (64,))
    assert not torch.equal(mine, other.normal("noise", (64,)))
    assert not torch.equal(mine, SampleRNG(7, [3]).normal("other", (64,)))


def test_draws_are_standard() -> None:
    # The mean of n normal draws has standard deviation n^-0.5, their variance (2/n)^0.5: five of them.
    n, rng = 2**18, SampleRNG(0, range(64))
    normal, uniform = rng.normal("noise", (n // 64,)), rng.uniform("time", (n // 64,))
    assert abs(float(normal.mean())) < 5 * n**-0.5
    assert abs(float(normal.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float(uniform.mean()) - 0.5) < 5 * (12 * n) ** -0.5
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1


def test_derived_seeds_differ_by_every_key() -> None:
    seeds = {derive_seed(s, name, i) for s in range(5) for name in ("a", "b") for i in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_everything_covers_every_global_generator() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    seed_everything(1, "model", 5)
    first = draw()
    draw()
    seed_everything(1, "model", 5)
    assert draw() == first


def test_initial_weights_do_not_depend_on_order_or_sharding(single_process_group: None) -> None:
    from dtrain.parallelize import parallelize
    from dtrain.sharding.mesh import MeshConfig, build_mesh
    from tests.dtrain.tiny_dit import TinyDiT

    def fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
        torch.nn.init.normal_(tensor, std=0.02, generator=generator)

    plain = TinyDiT(6, 24, 2, 2, 0.0)
    fill_parameters(plain, fill, seed=5)
    with torch.device("meta"):
        sharded = TinyDiT(6, 24, 2, 2, 0.0)
    parallelize(sharded, build_mesh(MeshConfig(), 1, "cpu"))
    sharded.to_empty(device="cpu")
    fill_parameters(sharded, fill, seed=5)
    for (name, a), b in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b.full_tensor()), name  # type: ignore[attr-defined]


def test_copy_full_refuses_another_shape() -> None:
    with pytest.raises(RuntimeError):
        copy_full(torch.empty(3), torch.ones(2))
