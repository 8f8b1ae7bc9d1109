"""Saving in the background: what is written is the state at the call, whole, and only the newest stay."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dtrain.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    Progress,
    TrainingState,
    check_resume,
    choose_checkpoint,
    find_checkpoint,
    read_progress,
    step_folders,
)
from dtrain.export import read_weights
from dtrain.optim import EMA, EMAConfig, OptimConfig, build_optimizer
from dtrain.parallelize import parallelize
from dtrain.sharding.mesh import MeshConfig, build_mesh
from tests.dtrain.tiny_dit import TinyDiT


def training_state(seed: int, ema: bool = True) -> TrainingState:
    torch.manual_seed(seed)
    model: nn.Module = TinyDiT(features=6, width=24, depth=2, heads=2, dropout=0.0)
    parallelize(model, build_mesh(MeshConfig(), 1, "cpu"))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, warmup_steps=0))
    averages = EMA(model, EMAConfig(decay=0.5)) if ema else None
    model(torch.randn(2, 5, 6), torch.rand(2)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if averages:
        averages.update(0)
    return TrainingState(model, optimizer, averages)


def progress(step: int) -> Progress:
    return Progress(step, sample=4 * step, seed=0, world=1, fingerprint="")


def checkpointer(folder: Path, keep: int = 3) -> Checkpointer:
    return Checkpointer(folder, CheckpointConfig(keep=keep), dist.new_group(backend="gloo"), is_main=True)


def flat(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()
    }


def test_training_on_does_not_change_what_is_being_saved(tmp_path: Path, single_process_group: None) -> None:
    state = training_state(0)
    expected = {name: tensor.clone() for name, tensor in flat(state.tensors()).items()}
    assert {name.split(".")[0] for name in expected} == {"model", "optim", "ema"}
    saver = checkpointer(tmp_path)
    saver.save(state, progress(1))
    with torch.no_grad():
        for tensor in flat(state.tensors()).values():
            tensor.fill_(7)
    saver.wait()
    other = training_state(1)
    other.load(tmp_path / "step-00000001")
    loaded = flat(other.tensors())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert read_progress(tmp_path / "step-00000001") == progress(1)


def test_the_last_few_are_kept(tmp_path: Path, single_process_group: None) -> None:
    state, saver = training_state(0), checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3):
        saver.save(state, progress(step))
    saver.wait()
    assert [path.name for path in step_folders(tmp_path)] == ["step-00000002", "step-00000003"]
    assert find_checkpoint(tmp_path).name == "step-00000003"
    assert find_checkpoint(tmp_path, 2).name == "step-00000002"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 1 .*step-00000002, step-00000003"):
        find_checkpoint(tmp_path, 1)


def test_a_rank_knows_when_its_part_is_written(tmp_path: Path, single_process_group: None) -> None:
    saver = checkpointer(tmp_path)
    saver.save(training_state(0), progress(1))
    assert saver._pending is not None
    saver._pending[0].result()
    assert saver.written
    saver.wait()
    assert not saver.writing
    assert [path.name for path in step_folders(tmp_path)] == ["step-00000001"]


def test_weights_without_averages(tmp_path: Path, single_process_group: None) -> None:
    state, saver = training_state(0, ema=False), checkpointer(tmp_path)
    saver.save(state, progress(1))
    saver.wait()
    weights = read_weights(tmp_path / "step-00000001", ema=False)
    assert weights.keys() == dict(state.model.named_parameters()).keys()
    with pytest.raises(ValueError, match="holds no EMA weights"):
        read_weights(tmp_path / "step-00000001", ema=True)


@pytest.mark.usefixtures("single_process_group")
def test_where_a_run_resumes(tmp_path: Path) -> None:
    assert choose_checkpoint(CheckpointConfig(), tmp_path) is None
    assert choose_checkpoint(CheckpointConfig(resume="never"), tmp_path) is None
    with pytest.raises(ValueError, match="no checkpoint is there"):
        check_resume(CheckpointConfig(resume=str(tmp_path / "absent")), tmp_path)
    state, saver = training_state(0), checkpointer(tmp_path)
    for step in (5, 12):
        saver.save(state, progress(step))
    saver.close()
    (tmp_path / "partial-00000020").mkdir()
    assert choose_checkpoint(CheckpointConfig(), tmp_path) == tmp_path / "step-00000012"
    older = tmp_path / "step-00000005"
    assert choose_checkpoint(CheckpointConfig(resume=str(older)), tmp_path) == older
    with pytest.raises(ValueError, match="already holds step-00000012"):
        check_resume(CheckpointConfig(resume="never"), tmp_path)
