"""The study of checkpoints on real ranks, and that its gates see what they are for. No time decides."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.link.neighbours import Neighbours
from benchmarks.record import write_record
from benchmarks.saving.__main__ import main
from benchmarks.saving.contestants import clear, contestants, disk_bytes
from benchmarks.saving.job import CONTESTANTS, OURS, PLAIN, Job, Workload
from benchmarks.saving.launch import RanksFailed, filesystem_of, run_job
from benchmarks.saving.records import Limits, RankRecord, Record
from benchmarks.saving.result import SavingRun, read_run, world_result
from benchmarks.saving.table import table
from benchmarks.saving.training import Training, bytes_that_differ, copied, spoil, whole_bytes
from benchmarks.studies import tables
from dtrain.dist import process_group
from dtrain.sharding.local import local_part
from tests.benchmarks.origin import ORIGIN

TINY = Workload(width=64, depth=2, batch=2)
QUIET = Neighbours(0.02, None)


@pytest.mark.distributed
def test_a_rehearsal_on_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--width", "64", "--depth", "2", "--batch", "2", "--rounds", "2"]
    out = tmp_path / "saving"
    assert main([*sizes, "--ranks", "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    run = read_run(out / "saving.json")
    (world,) = run.worlds
    assert (world.ranks, world.rounds, tuple(world.contestants)) == (2, 2, CONTESTANTS)
    assert [(gate.passed, gate.error) for gate in world.gates] == [(True, 0.0)] * 2
    # fp32 weights, two moments and averages, and a step of four bytes for each of the parameters.
    assert 0 < world.state_bytes - 16 * run.parameters < 4 * 100
    for name in CONTESTANTS:
        metrics = world.contestants[name]
        assert all(len(metric.samples) == 2 for metric in metrics.values())
        assert world.state_bytes < metrics["disk_bytes"].low
        assert world.steps_beside[name] >= 1
    assert {ratio.metric for ratio in world.ratios} >= {"stall_ms", "written_ms", "load_ms"}
    assert not (out / "checkpoints").exists()
    assert main(["--show", "--out", str(out)]) == 0
    assert shown == capsys.readouterr().out


def test_what_is_saved_comes_back_and_one_bit_is_seen(tmp_path: Path) -> None:
    with process_group() as world:
        training = Training(TINY, world)
        training.step()
        kept, before = copied(training.state), whole_bytes(training.state)
        assert before == sum(tensor.nbytes for tensor in kept.values())  # of the one rank
        for contestant in contestants(tmp_path, training.state).values():
            contestant.begin()
            training.step()
            contestant.finish()
            assert contestant.done() == (contestant.folder.name == "plain")
            assert disk_bytes(contestant.folder) > before
            spoil(training.state)
            assert bytes_that_differ(training.state, kept) > before / 2
            contestant.load()
            assert bytes_that_differ(training.state, kept) == 0
            clear(contestant.folder)
            assert not contestant.folder.exists()
        part = local_part(next(iter(training.ema.shards.values())))
        part.view(-1).view(torch.int32)[1] ^= 1
        assert bytes_that_differ(training.state, kept) == 1
        kept.pop(next(iter(kept)))
        assert bytes_that_differ(training.state, kept) > 1
    assert not dist.is_initialized()


def test_ranks_that_fail_are_named_with_the_end_of_their_log(tmp_path: Path) -> None:
    job = Job(replace(TINY, depth=3), 1, str(tmp_path / "checkpoints"), str(tmp_path))
    with pytest.raises(RanksFailed, match="depth = 3"):
        run_job(job, 1)


def record(seconds: float, wrong: int = 0) -> Record:
    two = (seconds, 3 * seconds)
    return Record(two, two, two, two, two, two, two, (2, 4), (0, wrong), (1100, 1100))


def ranks(wrong: int = 0) -> list[RankRecord]:
    """Two, the second of which takes twice as long."""
    return [
        RankRecord(60, 1000, {PLAIN: record(0.4 * k), OURS: record(0.1 * k, wrong)}, Limits((k,), (k,), (k,)))
        for k in (1.0, 2.0)
    ]


def test_times_are_the_slowest_ranks_and_gains_of_the_same_round() -> None:
    found = world_result(ranks(), QUIET)
    assert found.passed
    assert found.contestants[OURS]["stall_ms"].samples == (200.0, pytest.approx(600.0))
    stall, disk = found.ratio("stall_ms"), found.ratio("disk_bytes")
    assert stall is not None
    assert disk is not None
    assert (stall.value, disk.value) == (pytest.approx(4), 1)
    assert found.ratio("lost_ms") is None  # may be 0
    assert found.steps_beside == {PLAIN: 3.0, OURS: 3.0}
    assert found.limits["copy"].value == 2000


def test_a_red_gate_leaves_no_figure(run: SavingRun, tmp_path: Path) -> None:
    red = world_result(ranks(wrong=7), QUIET)
    assert not red.passed
    assert red.contestants[OURS] == {}
    assert red.contestants[PLAIN] != {}
    assert red.ratios == ()
    run = replace(run, worlds=(red,))
    assert "RED dtrain, 2 rank(s): bytes that a load brings back wrong: 7; no figures" in table(run)
    write_record(run, tmp_path / "saving" / "saving.json")
    shown = tables(tmp_path)["saving"]
    assert "RED dtrain" in shown
    assert shown.count("no figure |") == 8
    assert "<br>×" not in shown
    assert "bit for bit" not in shown
    assert main(["--show", "--out", str(tmp_path / "saving")]) == 1


@pytest.fixture
def run() -> SavingRun:
    return SavingRun(
        schema_version=1,
        workload=TINY,
        parameters=60,
        filesystem="ext4",
        worlds=(world_result(ranks(), QUIET),),
        environment={"OMP_NUM_THREADS": "1"},
        load_average=0.5,
        seconds=12.0,
        command="python -m benchmarks.saving --out benchmarks/results/saving",
        **ORIGIN,
    )


def test_a_readme_table_has_both_and_the_gains(run: SavingRun, tmp_path: Path) -> None:
    write_record(run, tmp_path / "saving" / "saving.json")
    rows = tables(tmp_path)["saving"].splitlines()
    assert rows[2].startswith("| plain PyTorch, 2 ranks | 1.600 s | 1.600 s |")
    assert rows[3].startswith("| dtrain, 2 ranks | 400.0 ms<br>×4.000")
    assert rows[3].endswith("| 0.0 MB<br>+10.00% |")
    assert "bit for bit" in rows[-1]
    assert rows[-1].endswith("`python -m benchmarks.saving`</sub>")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "ranks = 0"),
        (["--rounds", "0"], "rounds = 0"),
        (["--depth", "3"], "depth = 3"),
        (["--show", "--out", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_folder_has_a_file_system(tmp_path: Path) -> None:
    assert filesystem_of(tmp_path)
    assert filesystem_of(Path("/proc")) in ("proc", "unknown")
