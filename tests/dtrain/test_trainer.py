"""Whole runs of the command line, with real processes: resume, other world sizes, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dtrain.checkpoint import read_progress, step_folders
from dtrain.config import load
from dtrain.export import export
from dtrain.metrics.records import read_records
from dtrain.plan.peak import find_peak
from dtrain.plan.simulate import simulate
from tests.checkpoints import all_tensors
from tests.launch import run_python, torchrun

CONFIG = """
recipe = "tests.dtrain.tiny_dit:recipe"
output = "{output}"
seed = 3
[train]
steps = 20
global_batch = 4
micro_batch = 1
[optim]
lr = 1e-3
warmup_steps = 15
clip_norm = 0.5
[checkpoint]
every = 10
[metrics]
log_every = 5
tensorboard = false
[model]
dropout = 0.1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def config_file(folder: Path) -> Path:
    path = folder / "tiny.toml"
    path.write_text(CONFIG.format(output=folder))
    return path


def train(folder: Path, name: str, ranks: int, *sets: str, check: bool = True) -> str:
    settings = [word for setting in (f"name={name}", *sets) for word in ("--set", setting)]
    arguments = ("-m", "dtrain", "train", config_file(folder), *settings)
    done = torchrun(ranks, *arguments, check=check) if ranks > 1 else run_python(*arguments, check=check)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    train(folder, "undisturbed", 2, "metrics.predict_memory=always")
    return folder / "undisturbed"


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """A run that ends after 10 of its 20 steps."""
    train(folder, "stopped", 2, "train.steps=10")
    return folder / "stopped"


def continued(stopped: Path, name: str, ranks: int) -> Path:
    run = stopped.parent / name
    shutil.copytree(stopped, run)
    assert "resumed at step 10, sample 40" in train(stopped.parent, name, ranks)
    return run


@pytest.mark.distributed
def test_resume_is_bit_for_bit(undisturbed: Path, stopped: Path) -> None:
    run = continued(stopped, "resumed", 2)
    expected = all_tensors(undisturbed / "checkpoints" / "step-00000020")
    actual = all_tensors(run / "checkpoints" / "step-00000020")
    assert {name.split(".")[0] for name in expected} == {"model", "optim", "ema"}
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different
    assert all(average.dtype == torch.float32 for name, average in expected.items() if name[:3] == "ema")


@pytest.mark.distributed
def test_resume_on_one_rank_sees_the_same_samples_and_noise(undisturbed: Path, stopped: Path) -> None:
    run = continued(stopped, "on-one-rank", 1)
    losses = [{r["step"]: r["loss"] for r in read_records(r / "metrics.jsonl")} for r in (undisturbed, run)]
    # The same samples, noise and dropout masks differ between worlds only where dropout's global generator
    # is keyed by the micro-batch, which has one sample here: losses agree to rounding.
    for step in (15, 20):
        assert losses[0][step] == pytest.approx(losses[1][step], rel=1e-4)
    expected, actual = (all_tensors(r / "checkpoints" / "step-00000020") for r in (undisturbed, run))
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert read_progress(run / "checkpoints" / "step-00000020").world == 1


@pytest.mark.distributed
def test_what_a_run_leaves_behind(undisturbed: Path) -> None:
    assert [path.name for path in step_folders(undisturbed / "checkpoints")] == [
        "step-00000010",
        "step-00000020",
    ]
    assert not list((undisturbed / "checkpoints").glob("partial-*"))
    progress = read_progress(undisturbed / "checkpoints" / "step-00000020")
    assert (progress.step, progress.sample, progress.world) == (20, 80, 2)
    assert [r["step"] for r in read_records(undisturbed / "metrics.jsonl")] == [1, 5, 10, 15, 20]
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (summary["steps"], summary["samples"]) == (20, 80)
    planned = find_peak(simulate(load(undisturbed / "config.toml"), 2)).nbytes
    assert summary["memory"] == {"planned_gib": planned / 2**30}  # a CPU measures nothing
    notes = [json.loads(line).get("note", "") for line in (undisturbed / "metrics.jsonl").open()]
    assert sum(f"planned peak: {planned / 2**30:.3f} GiB (backward of" in note for note in notes) == 1
    assert notes[-1].startswith("memory, peak of the run: not measured on the CPU; planned")
    assert (undisturbed / "loss.png").stat().st_size > 5000
    assert 'recipe = "tests.dtrain.tiny_dit:recipe"' in (undisturbed / "config.toml").read_text()


@pytest.mark.distributed
@pytest.mark.parametrize(("ema", "kind"), [(True, "ema"), (False, "model")])
def test_export_writes_the_weights_of_the_checkpoint(undisturbed: Path, ema: bool, kind: str) -> None:
    path = export(undisturbed, undisturbed / f"{kind}.safetensors", ema=ema)
    stored = all_tensors(undisturbed / "checkpoints" / "step-00000020")
    exported = load_file(path)
    assert exported.keys() == {name.removeprefix("model.") for name in stored if name[:6] == "model."}
    assert all(torch.equal(tensor, stored[f"{kind}.{name}"]) for name, tensor in exported.items())


@pytest.mark.distributed
def test_a_partial_checkpoint_is_not_resumed_from(stopped: Path) -> None:
    run = stopped.parent / "interrupted"
    shutil.copytree(stopped, run)
    newest = run / "checkpoints" / "step-00000010"
    newest.rename(run / "checkpoints" / "partial-00000010")
    assert step_folders(run / "checkpoints") == []


def test_resume_never_refuses_to_overwrite(stopped: Path) -> None:
    output = train(stopped.parent, "stopped", 1, "checkpoint.resume=never", check=False)
    assert 'checkpoint.resume = "never"' in output
    assert "step-00000010" in output
    assert "Traceback" not in output


def test_another_seed_is_refused(stopped: Path) -> None:
    output = train(stopped.parent, "stopped", 1, "seed=4", check=False)
    assert "set seed = 3" in output
    assert "Traceback" not in output


@pytest.mark.distributed
def test_a_world_that_does_not_fit_stops_before_any_process_group(folder: Path) -> None:
    output = train(folder, "misfit", 2, "train.global_batch=5", "mesh.replicate=3", check=False)
    assert output.count("train.global_batch = 5 is not a multiple") == 1  # rank 0 alone speaks
    assert "use 4 or 6" in output
    assert "mesh.replicate = 3 does not divide the world size 2" in output
    assert not (folder / "misfit").exists()
