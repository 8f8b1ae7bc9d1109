"""The planned memory of a run: answers of the planner's process, and on a GPU against the allocator."""

import json
from pathlib import Path

import pytest

from dtrain.metrics.memory import Prediction
from tests.launch import run_python

CONFIG = """
recipe = "uvit.recipe:video"
output = "{output}"
[train]
steps = 4
global_batch = 8
micro_batch = 4
[model]
input_size = [8, 64, 64]
patch_size = [2, 4, 4]
in_channels = 3
width = 768
depth = 8
heads = 12
qk_norm = true
final_conv = false
condition = "class"
num_classes = 145
[data]
kind = "shapes"
frames = 8
height = 64
width = 64
workers = 0
[activations]
policy = "{policy}"
[metrics]
log_every = 1
tensorboard = false
"""


def config_file(folder: Path, policy: str = "none") -> Path:
    path = folder / "run.toml"
    path.write_text(CONFIG.format(output=folder, policy=policy))
    return path


def test_a_run_that_cannot_be_planned_is_told_why(tmp_path: Path) -> None:
    refused = Prediction(config_file(tmp_path), 2, "sm_90", tmp_path / "auto.json", ["comm.preset=auto"])
    answer = refused.read(200)
    refused.close()
    assert answer is not None
    assert answer.peak_bytes is None
    assert "name a preset to plan with" in answer.said[0]


def test_a_planner_that_dies_is_not_an_answer(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text('{"peak_bytes": 1, "said": []}')  # of an earlier part of the run
    killed = Prediction(config_file(tmp_path), 1, "sm_90", tmp_path / "memory.json")
    assert killed.read() is None
    killed.close()
    answer = killed.read()
    assert answer is not None
    assert answer.peak_bytes is None
    assert f"status -9 and no answer, see {tmp_path / 'memory.log'}" in answer.said[0]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_the_planned_peak_is_that_of_the_allocator(tmp_path: Path, policy: str) -> None:
    run_python("-m", "dtrain", "train", config_file(tmp_path, policy))
    memory = json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]
    print(policy, memory)
    assert memory["allocated_rank"] == 0
    assert memory["reserved_gib"] >= memory["allocated_gib"]
    assert memory["planned_gib"] == pytest.approx(memory["allocated_gib"], rel=0.03)
