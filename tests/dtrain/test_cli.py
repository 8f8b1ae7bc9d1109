"""The command line, as a user types it: help, mistakes, plans, and a run from training to export."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner, Result

from dtrain.__main__ import app
from dtrain.config import load
from dtrain.dryrun import dry_run, state_bytes
from dtrain.sharding.placement import placement
from tests.dtrain.tiny_dit import TinyDiT
from tests.launch import run_python, torchrun

CONFIG = """
recipe = "tests.dtrain.tiny_dit:recipe"
output = "{folder}"
[train]
steps = 2
global_batch = 8
micro_batch = 2
[model]
depth = 2
[metrics]
log_every = 1
"""


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG.format(folder=tmp_path / "runs"))
    return path


@pytest.fixture
def fake_world() -> Iterator[int]:
    """Rank 0 of 4, without peers: real shards, no communication."""
    dist.init_process_group("fake", rank=0, world_size=4)
    yield 4
    dist.destroy_process_group()


def dtrain(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(
        app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    )


def test_help_teaches_and_is_quick() -> None:
    shown = dtrain("--help").output
    assert all(command in shown for command in ("train", "sample", "export", "doctor", "config"))
    assert (
        "torchrun --nproc-per-node 8 -m dtrain train run.toml --set optim.lr=1e-4"
        in dtrain("train", "--help").output
    )
    run_python("-c", "import sys, dtrain.__main__; sys.exit('torch' in sys.modules)")


def test_a_mistake_is_one_message_before_any_process_group(
    run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a process group started"))
    typo = dtrain("train", run_toml, "--set", "optim.lrr=1", "--set", "mesh.shard=x")
    assert typo.exit_code == 2
    assert typo.stderr == (
        f"error: {run_toml} has 2 problems:\n"
        "  optim.lrr = 1: no such field; did you mean optim.lr?\n"
        '  mesh.shard = "x": must be an integer\n'
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    world = dtrain("train", run_toml)
    assert world.exit_code == 2
    assert "train.micro_batch x ranks = 2 x 3 = 6: use 6 or 12" in world.stderr


@pytest.mark.distributed
def test_torchrun_says_a_mistake_once(run_toml: Path) -> None:
    done = torchrun(2, "-m", "dtrain", "train", run_toml, "--set", "mesh.shard=3", check=False)
    assert done.returncode != 0
    assert done.stderr.count("mesh.replicate x mesh.shard = 1 x 3 = 3, but the world size is 2") == 1
    assert "exitcode  : 2" in done.stderr


def test_dry_run_reports_the_run(run_toml: Path) -> None:
    done = dtrain("train", run_toml, "--dry-run", "--ranks", "4")
    assert done.exit_code == 0, done.output
    count = sum(p.numel() for p in TinyDiT(6, 32, 2, 2, 0.0).parameters())
    assert f"TinyDiT, {count:,} parameters" in done.output
    assert "2 x Block: blocks.0 … blocks.1" in done.output
    assert "4 ranks = replicate 1 x shard 4" in done.output
    assert not (run_toml.parent / "runs").exists()
    refused = dtrain("train", run_toml, "--ranks", "4")
    assert refused.exit_code == 2
    assert "--ranks plans a --dry-run" in refused.stderr


def test_dry_run_counts_the_whole_step(run_toml: Path) -> None:
    rows = dict(dry_run(load(run_toml, ["train.global_batch=16"]), 4))
    forward = 16 * 2 * 5 * 2 * 12 * 32**2
    assert rows["training FLOPs"].startswith(f"{3 * forward / 1e12:,.4g} TFLOP per step")
    assert rows["batch"] == "16 = 2 per rank x 4 ranks x 2 micro-batches"


@pytest.mark.parametrize("width", [32, 42])
def test_planned_bytes_are_those_of_the_real_shards(fake_world: int, width: int) -> None:
    model = TinyDiT(6, width, 2, 2, 0.0)
    model.time.weight.requires_grad_(False)
    model.table = nn.Parameter(torch.empty(1, 130, 3 * 128))
    planned = state_bytes(model, fake_world, ema=True)
    mesh = init_device_mesh("cpu", (fake_world,))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: placement(p, fake_world))
    local = {p: _local_bytes(p) for p in model.parameters()}
    trained = sum(size for p, size in local.items() if p.requires_grad)
    assert planned.parameters == sum(local.values())
    assert (planned.gradients, planned.optimizer, planned.ema) == (trained, 2 * trained, trained)
    assert planned.total == planned.parameters + 4 * trained


def _local_bytes(parameter: nn.Parameter) -> int:
    assert isinstance(parameter, DTensor)
    local = parameter.to_local()
    return local.numel() * local.element_size()


def test_config_lists_checks_and_prints(run_toml: Path) -> None:
    listed = dtrain("config").output
    assert "optim.lr" in listed
    assert "Peak learning rate." in listed
    assert "default 0.0002" in listed
    assert "model.width" in dtrain("config", "model", "--recipe", "tests.dtrain.tiny_dit:recipe").output
    assert dtrain("config", run_toml).output == f"{run_toml}: valid (recipe tests.dtrain.tiny_dit:recipe)\n"
    printed = dtrain("config", "--toml", run_toml, "--set", "optim.lr=0.5").output
    assert tomllib.loads(printed)["optim"]["lr"] == 0.5
    (run_toml.parent / "effective.toml").write_text(printed)
    assert load(run_toml.parent / "effective.toml") == load(run_toml, ["optim.lr=0.5"])
    for arguments in (["optm"], [run_toml, "--set", "train.step=1"], ["--toml", run_toml, "--set", "seed=x"]):
        failed = dtrain("config", *arguments)
        assert failed.exit_code == 2
        assert failed.stderr.startswith("error: ")


def test_from_training_to_exported_weights(run_toml: Path) -> None:
    run = run_toml.parent / "runs" / "tiny"
    shown = run_python("-m", "dtrain", "train", run_toml).stdout
    assert "step 2/2" in shown
    assert "run summary" in shown
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert load(run / "config.toml") == load(run_toml)
    assert (run / "loss.png").stat().st_size > 1000
    weights = run_toml.parent / "out" / "tiny.safetensors"
    done = dtrain("export", run, weights)
    assert done.output.strip() == str(weights)
    TinyDiT(6, 32, 2, 2, 0.0).load_state_dict(load_file(weights))
    absent = dtrain("export", run, weights, "--step", "7")
    assert absent.exit_code == 2
    assert "no checkpoint of step 7" in absent.stderr
    sample = dtrain("sample", run)
    assert sample.exit_code == 2
    assert "brings no sampler" in sample.stderr
    assert "write it as name=value" in dtrain("sample", run, "--option", "steps").stderr
