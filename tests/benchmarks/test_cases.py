"""The cases: their baseline is the published model, their gates hold, their cost is what is executed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines.plain_uvit import PlainUViT
from benchmarks.case import discover
from benchmarks.cases.train_step_uvit_s2_cpu import (
    CHANNELS,
    PATCH,
    Size,
    cost,
    gradient_error,
    ours,
    plain,
    relative_error,
    train_step_case,
)
from benchmarks.harness import check_gates
from benchmarks.memory import persistent_bytes

OFFICIAL = Path(__file__).parent.parent / "fixtures" / "uvit_class.safetensors"
SMALL = Size(batch=2, width=64, depth=4, heads=2)


def test_baseline_is_the_official_model():
    with safe_open(OFFICIAL, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert config.pop("conv")
    assert not config.pop("mlp_time_embed")
    model = PlainUViT(**config)
    model.load_state_dict({k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")})
    got = model(tensors["input.x"], tensors["input.timesteps"], tensors["input.y"])
    got.square().mean().backward()
    assert relative_error(got.detach(), tensors["output.0"]) < 1e-5
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, tensors[f"grad.{name}"]) < 1e-5, name


def test_gates_hold_and_notice_a_wrong_weight():
    case = train_step_case(SMALL)
    works = {name: setup() for name, setup in case.contestants.items()}
    assert [gate.passed for gate in check_gates(case, works)] == [True, True]
    with torch.no_grad():
        works["dtrain"].model.decoder_pred.weight *= 1.01
    assert [gate.passed for gate in check_gates(case, works)] == [False, False]


def test_gates_notice_a_gradient_that_is_missing_or_nan():
    step, reference = ours(SMALL), plain(SMALL)
    reference.model.pos_embed.register_hook(lambda grad: grad * float("nan"))
    assert not gradient_error(step, reference) <= 1e-5
    deeper = ours(replace(SMALL, depth=6))
    assert gradient_error(deeper, step) == float("inf")


def test_both_sides_train_alike():
    steps = ours(SMALL), plain(SMALL)
    for _ in range(3):
        for step in steps:
            step()
    assert relative_error(*(step.loss().detach() for step in steps)) < 1e-4
    assert steps[0].loss() < ours(SMALL).loss()


def test_both_sides_keep_the_same_state():
    steps = ours(SMALL), plain(SMALL)
    for step in steps:
        step()
    assert len({persistent_bytes(step.model, step.optimizer) for step in steps}) == 1


def test_flops_are_those_that_the_plain_step_executes():
    step = plain(SMALL)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    # The plain model decodes its time token too, forwards and backwards, and drops the result.
    wasted = SMALL.batch * 3 * 2 * SMALL.width * PATCH**2 * CHANNELS
    assert counter.get_total_flops() == cost(SMALL).flops + wasted


def test_bytes_follow_from_the_parameters():
    assert cost(Size()).bytes == 28 * sum(p.numel() for p in plain(Size()).model.parameters())


def test_discovery_finds_the_case():
    assert discover()["train_step_uvit_s2_cpu"].baseline == "plain PyTorch"


@pytest.mark.parametrize("name", ["step_ms", "peak_above_state_bytes", "peak_live_bytes"])
def test_the_case_measures_time_and_both_peaks(name):
    assert name in [metric.name for metric in train_step_case(SMALL).metrics]
