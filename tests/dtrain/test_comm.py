"""Compressed collectives on four real ranks: what arrives, what it weighs, what survives a restart."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dtrain import comm_worker
from tests.launch import torchrun

pytestmark = pytest.mark.distributed

PRESETS = ["bf16", "int8", "int8-int4", "int4-delta"]
# One level, two levels, copies on two nodes, gathered again within a node.
SHAPES = ["", ":ranks_per_node=2", ":replicate=2:ranks_per_node=2", ":reshard=2"]
PLAIN = ["gradients:none", "gradients:none:replicate=2"]
GRADIENTS = [f"gradients:{preset}{shape}" for preset in PRESETS for shape in SHAPES]
WEIGHTS = [f"weights:{preset}{shape}" for preset in PRESETS[1:] for shape in SHAPES[:3]]
WEIGHTS += ["weights:int4-delta:reference=int8"]
NAN = ["not_finite:int8", "not_finite:int8-int4", "not_finite:int8-int4:ranks_per_node=2"]
BYTES = [f"message_bytes:{preset}" for preset in PRESETS]
TINY = ["tiny_gradients:int8", "tiny_gradients:int8-int4"]
FEEDBACK = [f"feedback:int8-int4:error_feedback={storage}" for storage in ("none", "int8", "bf16")]
FEEDBACK += [f"{FEEDBACK[1]}:ranks_per_node=2", f"{FEEDBACK[1]}:replicate=2:ranks_per_node=2"]
OTHERS = ["accumulation:int8-int4", "other_parts:int8-int4", "reentrant:int8", "alarm:int8"]
CHOICES = [f"choice:auto{shape}" for shape in SHAPES[:3]]
REPEATED = ["weights:int8-int4", "weights:int4-delta"]
CONTINUED = ["int8-int4", "int4-delta"]
RESUMED = ["int8-int4", "int4-delta", "int4-delta:reference=int8", "int8-int4:replicate=2"]


def run(ranks: int, out: Path, folder: Path, *scenarios: str) -> dict[str, list[dict[str, Any]]]:
    torchrun(ranks, Path(comm_worker.__file__), out, folder, *scenarios)
    return json.loads(out.read_text())


def resume(preset: str, first: int) -> str:
    return f"resume:{preset}:first={first}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comm")


@pytest.fixture(scope="module")
def four(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each of four ranks measured, by scenario."""
    scenarios = [*GRADIENTS, *WEIGHTS, "not_finite:bf16", *NAN, *BYTES, *TINY, *FEEDBACK, *OTHERS, *CHOICES]
    resumed = [resume(preset, first) for preset in RESUMED for first in (1, 0)]
    return run(4, folder / "four.json", folder, *PLAIN, *scenarios, *resumed)


@pytest.fixture(scope="module")
def two(four: dict, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each of two ranks measured, going on where four were."""
    return run(2, folder / "two.json", folder, *(resume(preset, 0) for preset in CONTINUED))


@pytest.mark.parametrize("scenario", GRADIENTS)
def test_gradients_are_those_of_the_whole_batch(four: dict, scenario: str) -> None:
    limit = {"bf16": 0.004, "int8": 0.02, "int8-int4": 0.25, "int4-delta": 0.25}[scenario.split(":")[1]]
    for rank in four[scenario]:
        assert rank["same_names"], rank["names"]
        assert not any("frozen" in name or "unused" in name for name in rank["names"])
        assert rank["exact"] < 1e-6
        assert limit / 40 < rank["compressed"] < limit
        assert limit / 40 < rank["table"] < limit
        assert rank["norm"] == pytest.approx(rank["norm_of_whole"], rel=1e-6)
    assert len({rank["norm"] for rank in four[scenario]}) == 1


@pytest.mark.parametrize("scenario", PLAIN)
def test_gradients_of_a_table_cut_along_another_dim(four: dict, scenario: str) -> None:
    for rank in four[scenario]:
        assert max(rank[kind] for kind in ("table", "exact", "compressed")) < 1e-6
        assert rank["norm"] == pytest.approx(rank["norm_of_whole"], rel=1e-6)


@pytest.mark.parametrize("scenario", WEIGHTS)
def test_ranks_compute_with_the_same_weights_forward_and_backward(four: dict, scenario: str) -> None:
    ranks = four[scenario]
    assert all(rank["forward"] == ranks[0]["forward"] for rank in ranks)
    assert all(rank["backward"] == rank["forward"] for rank in ranks)
    assert all(len(set(block)) == 8 for block in ranks[0]["forward"]), "the weights do not change"
    assert all(rank["exact_without_gradients"] and rank["trained_on_other_weights"] for rank in ranks)
    assert ranks[0]["losses"][-1] < 0.95 * ranks[0]["losses"][0]


@pytest.mark.parametrize("scenario", [s for s in WEIGHTS if "replicate" in s])
def test_replicas_stay_equal(four: dict, scenario: str) -> None:
    ranks = four[scenario]
    assert ranks[0]["masters"] == ranks[2]["masters"]
    assert ranks[1]["masters"] == ranks[3]["masters"]
    assert ranks[0]["masters"] != ranks[1]["masters"]


def test_levels_and_exact_parameters_are_said(four: dict) -> None:
    said = "\n".join(four["weights:int8-int4:ranks_per_node=2"][0]["said"])
    assert "2 ranks of a node in int8" in said
    assert "2 nodes in int4" in said
    assert "blocks.1.fc2.weight" in said


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_against_fsdp2_in_bf16_throughout(four: dict, preset: str) -> None:
    limit = {"bf16": 1.0, "int8": 0.52, "int8-int4": 0.43, "int4-delta": 0.18}[preset]
    # A scale of 2 bytes for each 256 weights and 128 gradients.
    weights, gradients = 1 + 2 / 256, 0.5 + 2 / 128
    counted = {
        "bf16": 6.0,
        "int8": 2 * weights + 1 + 2 / 128,
        "int8-int4": 2 * weights + gradients,
        "int4-delta": 0.5 + 2 / 256 + gradients,
    }
    ratio = four[f"message_bytes:{preset}"][0]["ratio"]
    assert ratio == pytest.approx(counted[preset] / 6, rel=1e-9)
    assert ratio <= limit


@pytest.mark.parametrize("scenario", NAN)
def test_nan_of_one_rank_arrives_everywhere_is_counted_and_leaves_no_trace(four: dict, scenario: str) -> None:
    ranks = four[scenario]
    assert all(rank["row_is_nan"] and rank["share_that_is_nan"] < 0.5 for rank in ranks)
    assert sum(rank["blocks"] for rank in ranks) >= 1
    assert all(rank["finite_afterwards"] for rank in ranks)


def test_nan_in_16_bits_arrives_as_it_is(four: dict) -> None:
    assert all(rank["row_is_nan"] and rank["finite_afterwards"] for rank in four["not_finite:bf16"])


@pytest.mark.parametrize("scenario", TINY)
def test_zero_and_denormal_gradients(four: dict, scenario: str) -> None:
    assert all(rank["zero_stays_zero"] and rank["tiny_stays_tiny"] for rank in four[scenario])


def test_errors_are_fed_back(four: dict) -> None:
    none, *kept = (four[scenario][0] for scenario in FEEDBACK)
    assert none["mean"] > 0.99 * none["one"]
    for result in kept:
        assert result["mean"] < result["one"] / 10


def test_accumulated_gradients_are_reduced_once(four: dict) -> None:
    result = four["accumulation:int8-int4"][0]
    assert result["distance"] < 0.25
    assert (result["reduced"], result["gathered"]) == (2, 1)


def test_other_parameters_may_have_gradients_in_another_step(four: dict) -> None:
    assert all(rank["unused_has_one"] and rank["finite"] for rank in four["other_parts:int8-int4"])


def test_the_outermost_forward_says_whether_there_are_gradients(four: dict) -> None:
    for rank in four["reentrant:int8"]:
        for digests in rank["digests"]:
            assert len(digests) == 3
            assert len(set(digests)) == 1


@pytest.mark.parametrize("scenario", CHOICES)
def test_auto_measures_every_link_and_ranks_choose_alike(four: dict, scenario: str) -> None:
    ranks = four[scenario]
    assert all(rank["preset"] == ranks[0]["preset"] and rank["said"] == ranks[0]["said"] for rank in ranks)
    assert ranks[0]["losses"][-1] < ranks[0]["losses"][0]
    said = "\n".join(ranks[0]["said"])
    axes = ["shard", "replicate"] if "replicate" in scenario else ["shard"]
    assert [f"the {axis} axis moves" in said for axis in ("shard", "replicate")] == [
        axis in axes for axis in ("shard", "replicate")
    ]
    levels = scenario == "choice:auto:ranks_per_node=2"
    assert (" within nodes" in said) == (" between nodes" in said) == levels
    assert said.count("auto: takes ") == len(axes)
    if len(axes) == 1:
        assert f"auto: takes {ranks[0]['preset']} " in said


def test_an_uncompressed_path_is_counted(four: dict) -> None:
    result = four["alarm:int8"][0]
    assert (result["before"], result["after"], result["in_evaluation"]) == (0, 1, 0)


@pytest.mark.parametrize("preset", RESUMED)
def test_a_resumed_run_is_the_undisturbed_one(four: dict, preset: str) -> None:
    undisturbed, resumed = four[resume(preset, 1)], four[resume(preset, 0)]
    assert resumed == undisturbed
    assert undisturbed[0]["state"], "nothing is remembered"


@pytest.mark.parametrize("preset", CONTINUED)
def test_on_another_number_of_ranks_the_curve_goes_on(four: dict, two: dict, preset: str) -> None:
    ranks = two[resume(preset, 0)]
    assert ranks[0]["losses"] == ranks[1]["losses"]
    references = four[resume(preset, 1)][0]["references"]
    assert ranks[0]["references"] == references
    assert ("reference.table" in references) == (preset == "int4-delta")
    # The same samples; what rounding took from one step's gradients is lost.
    for ours, theirs in zip(ranks[0]["losses"], four[resume(preset, 1)][0]["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=0.01)


def test_repeated_runs_are_equal_under_load(four: dict, folder: Path) -> None:
    busy = "import os; os.nice(5)\nwhile True: pass"
    burners = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(2)]
    try:
        again = run(4, folder / "again.json", folder, *REPEATED)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    timed = {"wire_codec_ms"}
    for scenario in REPEATED:
        for before, after in zip(four[scenario], again[scenario], strict=True):
            assert before["forward"] == after["forward"]
            assert before["losses"] == after["losses"]
            assert before["masters"] == after["masters"]
            assert {k: v for k, v in before["meter"].items() if k not in timed} == {
                k: v for k, v in after["meter"].items() if k not in timed
            }
