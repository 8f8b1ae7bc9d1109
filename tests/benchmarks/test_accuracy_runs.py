"""The study of kept accuracy on real ranks; and that its checks see what they are for."""

from pathlib import Path

import pytest

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.compare import faults
from benchmarks.accuracy.launch import run_study
from benchmarks.accuracy.settings import Settings
from benchmarks.accuracy.study import read
from tests.launch import torchrun

pytestmark = pytest.mark.distributed


def test_two_variants_train_on_four_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = Settings(
        steps=20, batch=4, seeds=(3,), clips=128, held_out=16, draws=4, points=5, repeat=10, warmup=5
    )
    run_study(small, ["none", "int8-int4"], tmp_path, jobs=1)
    assert main(["--show", "--out", str(tmp_path)]) == 0
    study = read(tmp_path / "accuracy.json")
    assert list(study.outcomes) == ["none", "int8-int4"]
    (plain,), (ours,) = (outcome.runs for outcome in study.outcomes.values())
    assert plain.loss is not None
    assert ours.loss is not None
    assert plain.held_out.steps[-1] == 20
    first, *_, last = plain.held_out.losses
    assert first is not None
    assert last is not None
    assert last < 0.9 * first
    assert plain.ema_loss not in (None, plain.loss)
    assert plain.training.losses[0] != plain.training.losses[-1]
    assert ours.training.losses[0] == pytest.approx(plain.training.losses[0], rel=1e-3)  # same weights, clips
    assert ours.loss == pytest.approx(plain.loss, rel=0.1)
    assert ours.loss != plain.loss
    assert (plain.repeats, ours.repeats) == (True, True)
    assert plain.weight_error == 0 < ours.weight_error < 0.02
    assert ours.wire_ratio > 4
    assert study.compressed > 0.98
    assert "checks: " in capsys.readouterr().out
    assert (tmp_path / "accuracy.png").exists()


def test_less_memory_trains_as_well(tmp_path: Path) -> None:
    name = "bf16 weights, 8-bit moments, bf16 average"
    small = Settings(
        steps=12, ranks=2, batch=4, seeds=(3,), clips=64, held_out=16, draws=4, points=2, repeat=6, warmup=3
    )
    study = run_study(small, ["none", name], tmp_path, jobs=1)
    (plain,), (ours,) = (outcome.runs for outcome in study.outcomes.values())
    assert not faults(study.outcomes)
    assert plain.loss is not None
    assert plain.ema_loss is not None
    assert ours.training.losses[0] == pytest.approx(plain.training.losses[0], rel=3e-3)  # weights are rounded
    assert ours.training.losses[0] != plain.training.losses[0]
    assert ours.loss == pytest.approx(plain.loss, rel=0.02)
    assert ours.ema_loss == pytest.approx(plain.ema_loss, rel=0.02)
    assert (ours.repeats, ours.weight_error) == (True, 0)


def test_a_rank_that_decodes_other_weights_is_seen(tmp_path: Path) -> None:
    torchrun(2, Path(__file__).with_name("accuracy_worker.py"), tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == '{"same": true, "one_bit": false, "error": 0.0}'
