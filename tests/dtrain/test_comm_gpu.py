"""Compressed collectives on CUDA streams, several ranks on one GPU: no race, and the bits of the CPU.

Where no GPU is, the same runs are rehearsed on the CPU, where nothing runs beside anything.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dtrain import comm_gpu_worker
from tests.launch import torchrun

pytestmark = [pytest.mark.gpu(rehearsal=True), pytest.mark.distributed]

PRESETS = ["int8", "int8-int4", "int4-delta"]
SHAPES = {2: [""], 4: ["", ":ranks_per_node=2", ":replicate=2:ranks_per_node=2"]}

# A rehearsal of two says whether it runs; four on two cores take a minute.
RANKS = [2, pytest.param(4, marks=pytest.mark.gpu)]


def run(ranks: int, out: Path, *scenarios: str) -> dict[str, list[dict[str, Any]]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torchrun(ranks, Path(comm_gpu_worker.__file__), out, device, *scenarios)
    results: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    assert {len(found) for found in results.values()} == {ranks}
    return results


@pytest.mark.parametrize("ranks", RANKS)
def test_no_schedule_changes_a_bit(ranks: int, tmp_path: Path) -> None:
    """Late compute, late collectives and freed memory full of NaN, against a run that waits everywhere."""
    scenarios = [f"steps:{preset}{shape}" for preset in PRESETS for shape in SHAPES[ranks]]
    results = run(ranks, tmp_path / "out.json", "poisoned:none", *scenarios)
    reached = [all(rank["reached"]) for rank in results.pop("poisoned:none")]
    assert all(reached) or not torch.cuda.is_available()
    for scenario, found in results.items():
        for rank, runs in enumerate(found):
            for schedule, digests in runs.items():
                place = f"{scenario}, rank {rank}, {schedule}"
                assert digests["finite"], place
                assert digests["forward"] == digests["backward"], place
                assert all(len(set(block)) == comm_gpu_worker.STEPS for block in digests["forward"]), place
                assert digests["forward"] == found[0]["serial"]["forward"], place
                assert digests == runs["serial"], place


@pytest.mark.parametrize("ranks", RANKS)
def test_a_gpu_gives_what_the_cpu_gives(ranks: int, tmp_path: Path) -> None:
    """Weights and whole-numbered gradients bit by bit; others as far as two devices round products alike."""
    scenarios = [f"against_cpu:{preset}{shape}" for preset in PRESETS for shape in SHAPES[ranks]]
    scenarios.append("against_cpu:int8-int4:rotation=0")
    for scenario, found in run(ranks, tmp_path / "out.json", *scenarios).items():
        for rank in found:
            assert rank["same_weights"], scenario
            assert rank["same_exact"], scenario
            assert rank["codec_error"] > 1e-3
            assert rank["distance"] < rank["codec_error"] / 4, scenario
