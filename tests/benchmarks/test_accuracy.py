"""The study of kept accuracy: what it concludes from losses, what it keeps, what it calls a fault."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy.clips import Clips, training_batches
from benchmarks.accuracy.compare import compare, faults
from benchmarks.accuracy.plot import plot
from benchmarks.accuracy.settings import Settings
from benchmarks.accuracy.study import SCHEMA_VERSION, Comparison, Curve, Outcome, Run, Study, read
from benchmarks.accuracy.table import table
from benchmarks.accuracy.training import _points, _thinned
from benchmarks.accuracy.variants import BASELINE, VARIANTS, Variant, chosen
from benchmarks.record import Device, write_record
from dtrain.activations.policy import ActivationConfig
from dtrain.comm import CommConfig
from tests.launch import ROOT


def run(seed: int, loss: float | None, preset: str = BASELINE, **changes: object) -> Run:
    curve = Curve((1, 2), (1.0, loss))
    of = Run(
        seed=seed,
        loss=loss,
        ema_loss=loss,
        training=curve,
        held_out=curve,
        replicas_equal=True,
        repeats=None,
        weight_error=0.0 if preset == BASELINE else 1e-3,
        wire_mib=1.0,
        wire_ratio=1.0,
        uncompressed=0,
        non_finite=0,
        step_ms=1.0,
    )
    return dataclasses.replace(of, **changes)  # type: ignore[arg-type]


def outcome(*losses: float | None, preset: str = BASELINE, **changes: object) -> Outcome:
    runs = tuple(run(seed, loss, preset, **changes) for seed, loss in enumerate(losses))
    return Outcome(False, {"preset": preset}, runs, "")


def study(**outcomes: Outcome) -> Study:
    return Study(
        schema_version=SCHEMA_VERSION,
        settings=Settings(),
        parameters=10,
        compressed=0.5,
        outcomes=outcomes,
        comparisons=compare(outcomes),
        seconds=1.0,
        device=Device("cpu", "A CPU", 2, 2**30),
        versions={"torch": "2.13.0"},
        commit=None,
        dirty=None,
        date="2026-01-02T03:04:05+00:00",
        command="python -m benchmarks.accuracy",
    )


def of_masters(found: Study, name: str) -> Comparison:
    (one,) = (c for c in found.comparisons if c.variant == name and c.weights == "masters")
    return one


@pytest.mark.parametrize(
    ("shift", "within_std", "within_range"),
    [(0.0, True, True), (0.9, True, True), (-0.9, True, True), (1.5, False, True), (-2.5, False, False)],
)
def test_a_gap_is_held_against_the_seeds_of_the_baseline(
    shift: float, within_std: bool, within_range: bool
) -> None:
    ours = outcome(*(x + shift for x in (3.0, 4.0, 5.0)), preset="int8")  # range 2, standard deviation 1
    one = of_masters(study(none=outcome(3.0, 4.0, 5.0), int8=ours), "int8")
    assert (one.within_std, one.within_range) == (within_std, within_range)
    assert one.gap == pytest.approx(shift)
    assert (one.baseline_range, one.baseline_std) == (pytest.approx(2.0), pytest.approx(1.0))


def test_seeds_are_paired_and_the_worst_is_signed() -> None:
    one = of_masters(study(none=outcome(1.0, 2.0, 3.0), int8=outcome(1.1, 1.5, 3.0, preset="int8")), "int8")
    assert one.worst == pytest.approx(-0.5)
    early = of_masters(study(none=outcome(1.0, 2.0, 9.0), int8=outcome(1.5, 2.5, preset="int8")), "int8")
    assert early.gap == pytest.approx(0.5)  # the third seed is only of the baseline


def test_averages_are_compared_with_averages() -> None:
    ours = Outcome(False, {"preset": "int8"}, (run(0, 1.0, "int8", ema_loss=7.0),), "")
    plain = Outcome(False, {"preset": BASELINE}, (run(0, 2.0, ema_loss=4.0),), "")
    gaps = {c.weights: c.gap for c in study(none=plain, int8=ours).comparisons if c.variant == "int8"}
    assert gaps == {"masters": -1.0, "ema": 3.0}


def test_a_loss_that_is_not_finite_is_outside() -> None:
    one = of_masters(study(none=outcome(1.0, 2.0), int8=outcome(1.0, None, preset="int8")), "int8")
    assert (one.mean, one.within_range, one.within_std) == (None, False, False)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"replicas_equal": False}, "different weights"),
        ({"repeats": False}, "other bits"),
        ({"uncompressed": 2}, "2 collectives"),
        ({"non_finite": 3}, "3 blocks"),
        ({"weight_error": 0.0}, "from the masters"),
    ],
)
def test_faults_are_named(changes: dict[str, object], word: str) -> None:
    assert not faults({"int8": outcome(1.0, preset="int8", repeats=True)})
    (fault,) = faults({"int8": outcome(1.0, preset="int8", **changes)})
    assert fault.startswith("int8, seed 0: ")
    assert word in fault


def test_what_did_not_end_is_a_fault() -> None:
    assert faults({BASELINE: Outcome(False, {"preset": BASELINE}, (), "exit code 1")}) == [
        "none: exit code 1"
    ]


def test_a_study_is_read_back_and_drawn(tmp_path: Path) -> None:
    found = study(none=outcome(1.0, 1.2), int8=outcome(1.1, None, preset="int8"), bf16=outcome(preset="bf16"))
    write_record(found, tmp_path / "accuracy.json")
    assert read(tmp_path / "accuracy.json") == found
    (tmp_path / "accuracy.json").write_text("{}")
    with pytest.raises(ValueError, match=r"accuracy\.json: \$\."):
        read(tmp_path / "accuracy.json")
    plot(found, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert "NOT FINITE" in table(found)


def test_ranks_divide_each_step_and_seeds_change_the_order_alone() -> None:
    settings = Settings(batch=8, ranks=4, clips=64)
    clips = Clips(torch.zeros(64, 3, 4, 16, 16, dtype=torch.uint8), torch.arange(64))

    def items(seed: int) -> Tensor:
        ranks = [training_batches(clips, settings, seed, rank) for rank in range(4)]
        return torch.cat([next(batches)["class"] for _ in range(8) for batches in ranks])

    assert items(0).sort().values.tolist() == list(range(64))  # an epoch: every clip once
    assert torch.equal(items(0), items(0))
    assert not torch.equal(items(0), items(1))


def test_points_end_with_the_last_step() -> None:
    assert _points(2000, 20)[-1] == 2000
    assert len(_points(2000, 20)) == 20
    assert _points(3, 20) == (1, 2, 3)
    assert _thinned(torch.arange(200.0)).losses[:2] == (0.5, 2.5)


def test_variants() -> None:
    assert chosen(["int8"]) == [BASELINE, "int8"]
    assert len(chosen(None)) == 7
    assert sum(VARIANTS[name].ablation for name in chosen(None)) == 2
    with pytest.raises(ValueError, match="int7"):
        chosen(["int7"])


def test_what_a_variant_changes_beside_collectives_is_in_the_file() -> None:
    plain = VARIANTS[BASELINE].words()
    assert plain == {name: str(value) for name, value in dataclasses.asdict(CommConfig()).items()}
    assert Variant().words() == plain
    variant = VARIANTS["bf16 weights, 8-bit moments, bf16 average"]
    changed = {"optim.moments": "8bit", "optim.weights": "bf16", "ema.dtype": "bf16"}
    assert variant.words() == plain | changed
    settings = Settings()
    optim, average = variant.optim(settings.optim), variant.ema(settings.average)
    assert (optim.moments, optim.weights, average.dtype) == ("8bit", "bf16", "bf16")
    assert (optim.lr, average.decay) == (settings.lr, settings.ema)
    assert Variant(activations=ActivationConfig(policy="full")).words() == plain | {
        "activations.policy": "full"
    }


def test_the_recorded_study_is_read() -> None:
    recorded = read(ROOT / "benchmarks" / "results" / "accuracy" / "accuracy.json")
    assert BASELINE in recorded.outcomes
    assert not table(recorded).startswith("FAULT")


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"batch = 6: .* 8 would be"):
        Settings(batch=6, ranks=4)
    with pytest.raises(ValueError, match="steps = 5"):
        Settings(steps=5)
