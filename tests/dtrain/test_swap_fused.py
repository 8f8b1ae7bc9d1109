"""Third-party models with their norms and MLPs swapped compute what they computed, through the fused ones."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dtrain.activations.policy import ActivationConfig, apply_activation_policy
from dtrain.kernels.norm import norm
from dtrain.parallelize import ParallelConfig, parallelize
from dtrain.sharding.mesh import MeshConfig, build_mesh
from dtrain.sharding.shard import ShardConfig
from dtrain.swap import fusion, norms
from dtrain.swap.fusion import swap_fused
from tests.dtrain import third_party as made
from tests.dtrain.sharded_worker import tiny_dit, uvit
from tests.dtrain.third_party import assert_same, filled, gradients, loss

# model, norms and MLPs swapped, norms in a forward pass, how many of those take in a scale and a shift
MODELS: list[tuple[Callable[[], made.Made], int, int, int]] = [
    (made.dit, 7, 5, 5),
    (made.wan, 17, 15, 5),
    (made.cogvideox, 12, 14, 9),
    (made.hunyuan_video, 19, 17, 7),
    (made.pixart, 7, 5, 5),
    (made.packed, 4, 4, 0),
    (tiny_dit, 9, 6, 6),
]
NAMES = [row[0].__name__ for row in MODELS]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every fused norm that runs in a swapped module, whether it scales and shifts."""
    seen: list[bool] = []

    def spy(x: Tensor, *args: Any, **how: Any) -> Tensor:
        seen.append(how["scale"] is not None and how["shift"] is not None)
        return norm(x, *args, **how)

    monkeypatch.setattr(norms, "norm", spy)
    return seen


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("make", "layers", "count", "modulated"), MODELS, ids=NAMES)
def test_loss_and_every_gradient_equal(
    calls: list, backend: Any, make: Callable, layers: int, count: int, modulated: int
) -> None:
    model, inputs = filled(make)
    swapped = copy.deepcopy(model)
    done = swap_fused(swapped, backend)
    assert_same(model, swapped, inputs)
    assert (len(done.swapped), len(calls), sum(calls)) == (layers, count, modulated)
    assert list(swapped.state_dict()) == list(model.state_dict())


def test_what_looks_like_one_and_is_none_is_left_and_said(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def mlp(act: nn.Module, **more: nn.Module) -> nn.Module:
        module = nn.Module()
        for name, layer in {"fc1": nn.Linear(4, 8), "act": act, "fc2": nn.Linear(8, 4), **more}.items():
            setattr(module, name, layer)
        return module

    modules = {
        "scaled": Scaled(4),
        "two": nn.LayerNorm((3, 4)),
        "silu": mlp(nn.SiLU()),
        "dropout": mlp(nn.GELU(), drop=nn.Dropout(0.1)),
        "normed": mlp(nn.GELU(), norm=nn.LayerNorm(8)),
        "gated": mlp(nn.GELU(), fc2=nn.Linear(4, 4)),
        "lazy": mlp(nn.GELU(), fc1=nn.Bilinear(4, 4, 8)),
    }
    with caplog.at_level(logging.WARNING, logger=fusion.__name__):
        done = swap_fused(nn.ModuleDict(modules))
    assert done.left == {
        "scaled": "Scaled may do more than the norm that it is made from",
        "two": "it norms over 2 dims",
        "silu": "its activation is SiLU, not GELU",
        "dropout": "dropout with p = 0.1",
        "normed": "LayerNorm stands between its layers",
        "gated": "its second linear does not take what the first gives",
        "lazy": "Bilinear is no plain nn.Linear",
    }
    assert list(done.swapped) == ["normed.norm"]
    assert "left 1 (silu): its activation is SiLU, not GELU" in caplog.text


def test_a_second_swap_changes_the_backend() -> None:
    model, inputs = filled(made.dit)
    first, second = swap_fused(model, "reference"), swap_fused(model, "triton")
    assert first == second
    with pytest.raises(ValueError, match="backend = 'triton'"):
        loss(model, inputs)


def test_a_meta_model_is_swapped_and_filled_later() -> None:
    model, inputs = filled(made.dit)
    with torch.device("meta"):
        swapped, _ = made.dit()
    swap_fused(swapped)
    swapped.to_empty(device="cpu").load_state_dict(model.state_dict())
    for (name, buffer), (_, wanted) in zip(swapped.named_buffers(), model.named_buffers(), strict=True):
        assert buffer.copy_(wanted).equal(wanted), name
    assert_same(model, swapped, inputs)


def test_checkpointing_comes_after_the_swap() -> None:
    model, _ = filled(made.dit)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = lambda x: x
    reasons = {"its forward was replaced before: swap norms and MLPs first"}
    assert set(swap_fused(model).left.values()) == reasons


@pytest.mark.parametrize("make", [made.dit, made.wan, made.cogvideox, tiny_dit])
def test_compiles_without_a_break_and_no_more_often(make: Callable) -> None:
    model, inputs = filled(make)
    swapped = copy.deepcopy(model)
    swap_fused(swapped)
    counts = []
    for net in (copy.deepcopy(model), swapped):
        torch.compiler.reset()
        counter = CompileCounter()
        for block in getattr(net, "transformer_blocks", None) or net.blocks:
            block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
        loss(net, inputs)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0
    assert_same(model, swapped, inputs)


@pytest.mark.parametrize("make", [made.dit, made.wan, tiny_dit, uvit])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.usefixtures("single_process_group")
def test_parallelized_with_pieces_and_checkpointing(make: Callable, chunks: int) -> None:
    model, inputs = filled(make)
    swapped = copy.deepcopy(model)
    config = ParallelConfig(activations=ActivationConfig("full", chunks))
    if make is made.dit:
        shard = ShardConfig(extra_units=("transformer_blocks.0.norm1.emb",))
        config = ParallelConfig(activations=config.activations, shard=shard)
    parallelize(swapped, build_mesh(MeshConfig(), 1, "cpu"), config)
    assert {module.chunks for module in swapped.modules() if hasattr(module, "chunks")} == {chunks}
    losses = [loss(net, inputs) for net in (model, swapped)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    sum(losses).backward()
    found = {name: g.full_tensor() for name, g in gradients(swapped).items()}
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)


def test_pieces_need_an_mlp_that_can_be_cut() -> None:
    with pytest.raises(ValueError, match="mlp_chunks = 2: no block has an MLP"):
        apply_activation_policy([nn.Linear(2, 2)], ActivationConfig(mlp_chunks=2))
    with pytest.raises(ValueError, match="mlp_chunks = 0: must be 1 or more"):
        ActivationConfig(mlp_chunks=0)
