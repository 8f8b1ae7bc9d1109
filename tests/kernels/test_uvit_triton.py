"""U-ViTs learn the same by the Triton kernels and by PyTorch's operators: the demo's step, and windows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import uvit
from dtrain.rng import SampleRNG
from tests.kernels.attention_checks import DEVICE, draw, needs_triton
from tests.kernels.test_swap_triton import Ops
from uvit.layers import Attention

pytestmark = needs_triton

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.toml"


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in which nothing is zero."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.to(DEVICE)


def gradients(model: nn.Module, loss: Callable[[], Tensor], backend: str) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients; by "triton" all runs as operators of ours, by others nothing does."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attention_backend = backend
        elif hasattr(module, "fused_backend"):
            module.fused_backend = "triton" if backend == "triton" else "reference"
    with Ops() as ops:
        value = loss()
        found = torch.autograd.grad(value, list(model.parameters()))
    ours = {
        "qkv_attention_forward": (blocks := len(model.in_blocks) + 1 + len(model.out_blocks)),
        "qkv_attention_backward": blocks,
        "norm": 2 * blocks + 1,
        "norm_backward": 2 * blocks + 1,
        "gelu_linear": blocks,
        "gelu_linear_backward": blocks,
    }
    runs = backend == "triton"
    assert {name: ops.count[f"dtrain::{name}"] for name in ours} == (ours if runs else dict.fromkeys(ours, 0))
    return value, list(found)


def test_the_demos_step_learns_the_same_on_both_paths() -> None:
    config_module = pytest.importorskip("dtrain.config", reason="reads the demo's config")
    recipe = config_module.build_recipe(config_module.load(DEMO))
    model = build(recipe.build)
    batch = {"video": draw(1, 3, 4, 16, 24), "caption": ["a bouncing ball"], "class": [0], "index": [0]}

    def loss() -> Tensor:
        return recipe.loss(model, batch, SampleRNG(0, [0], DEVICE))

    ours, theirs = (gradients(model, loss, backend) for backend in ("triton", "sdpa"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_windows_on_a_ragged_grid() -> None:
    config = uvit.UViTConfig((2, 5, 7), (1, 1, 1), width=32, depth=2, heads=1, positions="rope", qk_norm=True)
    model = build(lambda: uvit.build(config, window=(1, 4, 4), window_tile=(1, 4, 4)))
    x, time = draw(1, 4, 2, 5, 7), torch.tensor([300.0], device=DEVICE)
    ours, theirs = (
        gradients(model, lambda: model(x, time).sin().sum(), backend) for backend in ("triton", "reference")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
