"""Runs that go on with another number of ranks: the same samples, noise and state."""

from pathlib import Path

import pytest
import torch

from dtrain.metrics.records import read_records
from tests.checkpoints import all_tensors
from tests.faults.runs import Run
from tests.launch import torchrun

pytestmark = pytest.mark.distributed


def test_worlds_change_and_samples_do_not(folder: Path) -> None:
    """2, then 4, 1 and 3 ranks, with replicas among them, see what 2 ranks see, and the same noise."""
    sets = (
        "train.global_batch=12",
        "model.dropout=0",
        "optim.warmup_steps=3",
        "faults.check_replicas_every=1",
    )
    stays = Run(folder, "stays")
    stays.train(sets=(*sets, "train.steps=8"))
    for stage, (ranks, replicate) in enumerate([(2, 1), (4, 2), (1, 1), (3, 1)], start=1):
        moves = Run(folder, "moves", ranks=ranks)
        moves.train(sets=(*sets, f"train.steps={2 * stage}", f"mesh.replicate={replicate}"))
    wanted, found = (
        {record["step"]: record["loss"] for record in read_records(run.path / "metrics.jsonl")}
        for run in (stays, moves)
    )
    assert set(wanted) == set(range(1, 9))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_state_is_the_same_on_every_world(folder: Path) -> None:
    """What 2 ranks saved, 4 (as 2 x 2), 1 and 3 load and save again: all of it equal, bit for bit."""
    sets = ("optim.moments=8bit", "optim.weights=bf16", "ema.dtype=bf16")
    first = Run(folder, "first")
    first.train(sets=(*sets, "train.steps=4", "optim.warmup_steps=2"))
    source = first.path / "checkpoints" / "step-00000004"
    saved = all_tensors(source)
    assert {name.split(".")[0] for name in saved} == {"model", "optim", "ema"}
    for ranks, replicate in [(4, 2), (1, 1), (3, 1)]:
        on = Run(folder, f"{first.name}-on-{ranks}", ranks)
        there = (f"checkpoint.resume={source}", f"mesh.replicate={replicate}", "train.global_batch=12")
        torchrun(ranks, "-m", "tests.faults.rewrite", on.config(), *on.settings(*sets, *there))
        source = on.path / "checkpoints" / "step-00000004"
        assert len(list(source.glob("*.distcp"))) == ranks
        again = all_tensors(source)
        assert again.keys() == saved.keys()
        assert not [name for name in saved if not torch.equal(saved[name], again[name])]
