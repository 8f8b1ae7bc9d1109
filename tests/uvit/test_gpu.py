"""What only a CUDA device can show: whole runs in bf16, exact resume there, and the official tensors."""

import json
from pathlib import Path

import pytest
import torch

import uvit
from dtrain.metrics.records import read_records
from tests.launch import run_python

pytestmark = pytest.mark.gpu

CONFIG = """
recipe = "uvit.recipe:video"
output = "{output}"
[train]
steps = 8
global_batch = 8
micro_batch = 4
sample_every = 8
samples = 2
[model]
input_size = [8, 32, 32]
patch_size = [2, 4, 4]
in_channels = 3
width = 256
depth = 4
heads = 4
qk_norm = true
positions = "rope"
condition = "text"
text_dim = 32
text_tokens = 32
[data]
kind = "shapes"
frames = 8
height = 32
width = 32
[sample]
steps = 4
guidance = 1.0
[optim]
lr = 1e-3
warmup_steps = 4
[checkpoint]
every = 4
[metrics]
log_every = 1
"""


def train(folder: Path, name: str, *sets: str) -> dict[int, float]:
    path = folder / "gpu.toml"
    path.write_text(CONFIG.format(output=folder))
    settings = [word for setting in (f"name={name}", *sets) for word in ("--set", setting)]
    run_python("-m", "dtrain", "train", path, *settings)
    return {r["step"]: r["loss"] for r in read_records(folder / name / "metrics.jsonl")}


def test_a_run_in_bf16_tells_what_it_cost(tmp_path: Path) -> None:
    losses = train(tmp_path, "bf16")
    assert losses[8] < losses[1]
    summary = json.loads((tmp_path / "bf16" / "summary.json").read_text())
    assert summary["peak_memory_gib"] > 0
    assert summary["energy_per_sample_joules"] is None or summary["energy_per_sample_joules"] > 0
    assert (tmp_path / "bf16" / "samples" / "step-00000008" / "contact_sheet.png").exists()


@pytest.mark.parametrize("setting", ["activations.policy=full", "compile.enabled=true"])
def test_policies_keep_the_loss(tmp_path: Path, setting: str) -> None:
    plain, changed = train(tmp_path, "plain"), train(tmp_path, "changed", setting)
    for step, loss in plain.items():
        assert changed[step] == pytest.approx(loss, rel=2e-2)


def test_resume_continues_the_same_losses(tmp_path: Path) -> None:
    whole = train(tmp_path, "whole")
    train(tmp_path, "parts", "train.steps=4")
    parts = train(tmp_path, "parts")
    # The same samples and noise; only atomics in a backward pass may round differently.
    assert all(parts[step] == pytest.approx(loss, rel=1e-3) for step, loss in whole.items())


def test_bf16_blocks_stay_near_fp32() -> None:
    torch.manual_seed(0)
    model = uvit.build("imagenet256_l2", width=256, depth=4, heads=4).cuda()
    x, t = torch.randn(2, 4, 32, 32, device="cuda"), torch.tensor([3.0, 999.0], device="cuda")
    y = torch.tensor([1, 1000], device="cuda")
    exact = model(x, t, y)
    rounded = model.bfloat16()(x, t, y).float()
    assert float((rounded - exact).norm() / exact.norm()) < 2e-2
