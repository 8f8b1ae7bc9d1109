"""The memory ladder: every rung trains the same function, and what is planned of it is what it holds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.ladder import workloads
from benchmarks.ladder.__main__ import main
from benchmarks.ladder.baselines import baseline
from benchmarks.ladder.planned import config_of, plan_rung
from benchmarks.ladder.recipe import LatentsConfig, first_batch, latents
from benchmarks.ladder.result import Row
from benchmarks.ladder.rungs import RUNGS
from benchmarks.ladder.workloads import WORKLOADS, Workload
from benchmarks.memory import peak_bytes
from dtrain.config import build_recipe
from dtrain.plan.fake import alone, faked, without_data
from dtrain.plan.ledger import Ledger
from dtrain.plan.observe import Subject, observe
from dtrain.plan.peak import find_peak
from dtrain.recipe import Batch
from dtrain.rng import SampleRNG
from dtrain.sharding.mesh import MeshConfig, build_mesh
from uvit import UViTConfig

_MODEL = UViTConfig(width=128, depth=4, heads=2, num_classes=5, condition="class", final_conv=False)
SMALL = {
    "clips": Workload("clips", "", replace(_MODEL, input_size=(8, 16, 16))),
    "images": Workload("images", "", _MODEL, samples=4),
    "dit": Workload("dit", "", _MODEL, samples=4, kind="dit"),
}


@pytest.mark.parametrize("name", ["clips", "images"])
def test_plain_and_ours_are_one_function(name: str) -> None:
    """With one set of weights: the loss and every gradient."""
    plain, ours = (build_recipe(config_of(SMALL[name], RUNGS[rung], 1)) for rung in ("B1", "full"))
    torch.manual_seed(0)
    models = plain.build(), ours.build()
    for parameter in models[0].parameters():
        nn.init.normal_(parameter, std=0.05)
    shapes = {name: p.shape for name, p in models[1].named_parameters()}
    # Ours keeps the kernel of patches of one frame as an image's.
    models[1].load_state_dict({n: x.reshape(shapes[n]) for n, x in models[0].state_dict().items()})
    batch = first_batch(ours, SMALL[name].samples)
    losses = []
    for recipe, model in zip((plain, ours), models, strict=True):
        loss = recipe.loss(model, batch, SampleRNG(0, batch["index"]))
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for label, a in models[0].named_parameters():
        b = models[1].get_parameter(label)
        assert a.grad is not None, label
        assert b.grad is not None, label
        assert (a.grad.flatten() - b.grad.flatten()).norm() <= 1e-5 * a.grad.norm(), label


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("rung", ["B1", "B2", "B3", "B4"])
def test_a_baseline_holds_what_is_planned(name: str, rung: str) -> None:
    """Rank 0 of one, with data and without: as its operators tell, and by the allocator's events.

    The allocator also knows what CPU kernels take inside, some 0.4 MB of attention's.
    """
    config = config_of(SMALL[name], RUNGS[rung], 1)
    recipe = build_recipe(config)
    batch = first_batch(recipe, config.train.micro_batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    [unreal] = faked([batch], mode)
    with alone(1):
        mesh = build_mesh(MeshConfig(), 1, "cpu")

        def subject(batch: Batch, ledger: Ledger) -> Subject:
            return baseline(recipe, RUNGS[rung], batch, mesh, ledger)

        def peak(batch: Batch) -> int:
            ledger = Ledger()
            return find_peak(observe(subject(batch, ledger), ledger)).nbytes

        with without_data(mode):
            planned = peak(unreal)
        assert peak(batch) == pytest.approx(planned, rel=3e-3)
        real = subject(batch, Ledger())
        for _ in range(2):  # DDP sorts its buckets anew before the second step
            real.gradients()
            real.optimizer.zero_grad(set_to_none=True)
        in_buckets = sum(4 * p.numel() for p in real.model.parameters() if p.requires_grad)
        held = sum(x.untyped_storage().nbytes() for x in tensors(real))
        held += in_buckets if RUNGS[rung].base == "ddp" else 0
        assert 0 <= held + peak_bytes(real.gradients) - planned < 1e6


def tensors(subject: Subject) -> list[torch.Tensor]:
    kept = [x for group in subject.state.values() for x in group]
    return [getattr(x, "_local_tensor", x) for x in kept]


def test_rungs_of_a_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    """What must hold whatever the size: remedies take memory off, and checkpointing costs a forward."""
    monkeypatch.setitem(workloads.WORKLOADS, "clips", SMALL["clips"])
    rows: dict[str, Row] = {rung: plan_rung("clips", rung, 4, "h100") for rung in RUNGS}
    order = ["none", "selective", "full", "chunks"]
    peaks = [rows[rung].peak_bytes for rung in order]
    assert peaks == sorted(peaks, reverse=True)
    assert rows["B1"].peak_bytes > rows["B2"].peak_bytes > rows["B4"].peak_bytes > rows["full"].peak_bytes
    assert rows["B1"].flops == rows["B3"].flops == pytest.approx(rows["none"].flops, rel=1e-4)
    assert rows["B2"].flops == rows["B4"].flops > rows["B1"].flops
    assert rows["host"].host_bytes > 0 == rows["full"].host_bytes
    assert sum(rows["B4"].kinds.values()) == rows["B4"].peak_bytes
    state = ("optimizer", "averages")
    assert all(rows["host-8bit"].kinds[kind] < rows["host"].kinds[kind] for kind in state)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--workloads", "h2", "--worlds", "8", "--rungs", "B2", "host"]
    assert main([*chosen, "--out", str(tmp_path), "--jobs", "1"]) == 0
    text = capsys.readouterr().out
    assert all(words in text for words in ("U-ViT-H/2", "of B2", "not measured"))
    assert len(json.loads((tmp_path / "ladder.json").read_text())["rows"]) == 2
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    assert main(["--show", "--out", str(tmp_path)]) == 0
    assert text.endswith(capsys.readouterr().out)
    (tmp_path / "ladder.json").write_text("{}")
    assert main(["--show", "--out", str(tmp_path)]) == 2


def test_sizes() -> None:
    """Tokens and parameters are those that the names say."""
    for name, workload in WORKLOADS.items():
        with torch.device("meta"):
            model = latents(LatentsConfig(config_of(workload, RUNGS["B1"], 1).recipe_config.model)).build()
        count = sum(p.numel() for label, p in model.named_parameters() if label != "pos_embed")
        if name[0].isdigit():
            size, length = name.split("-")
            assert count == pytest.approx(float(size[:-1]) * 1e9, rel=0.1), name
            assert (
                model.get_parameter("pos_embed").shape[1] - 2
                == 2 ** {"8k": 13, "33k": 15, "131k": 17}[length]
            )
