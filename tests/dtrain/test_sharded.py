"""Sharded on two real ranks equals unsharded, for our model and for models that know nothing of dtrain."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.mesh import MeshConfig, build_mesh
from dtrain.parallelize import ParallelConfig, parallelize
from dtrain.shard import ShardConfig
from tests.dtrain import sharded_worker
from tests.launch import torchrun

MODELS = ["tiny_dit", "uvit", "diffusers_dit", "diffusers_wan"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("sharded") / "distances.json"
    torchrun(2, Path(sharded_worker.__file__), out)
    return json.loads(out.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("policy", "replicate"), [("none", 1), ("full", 1), ("none", 2)])
def test_loss_and_every_gradient_equal(results: dict, name: str, policy: str, replicate: int) -> None:
    result = results[f"{name}-{policy}-{replicate}"]
    assert result["loss"] < 1e-6
    assert len(result["gradients"]) > 10
    assert max(result["gradients"].values()) < 1e-5, result["gradients"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_holds_its_share_of_the_parameters(results: dict, name: str) -> None:
    sharded = results[f"{name}-none-1"]
    assert sharded["sharded_parameters"] <= 0.52 * sharded["parameters"]
    replicated = results[f"{name}-none-2"]
    assert replicated["sharded_parameters"] == replicated["parameters"]


def test_a_call_from_outside_a_block_is_named(single_process_group: None) -> None:
    torch.manual_seed(0)
    model, inputs = sharded_worker.MODELS["diffusers_dit"]()
    parallelize(model, build_mesh(MeshConfig(), 1, "cpu"))
    with pytest.raises(ValueError, match=r"transformer_blocks.0.norm1.emb.*shard.extra_units"):
        model(**inputs)


def test_an_extra_unit_that_does_not_exist_is_named(single_process_group: None) -> None:
    model, _ = sharded_worker.MODELS["tiny_dit"]()
    config = ParallelConfig(shard=ShardConfig(extra_units=("blocks.0.mpl",)))
    with pytest.raises(ValueError, match=r"'blocks.0.mpl' matches no module; near it: blocks.0.mlp"):
        parallelize(model, build_mesh(MeshConfig(), 1, "cpu"), config)


def test_bf16_compute_keeps_fp32_masters_and_timesteps(single_process_group: None) -> None:
    seen: dict[str, torch.dtype] = {}

    class Probe(sharded_worker.TinyDiT):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.update(x=x.dtype, t=t.dtype, weight=self.embed.weight.dtype)
            return super().forward(x, t)

    model: nn.Module = Probe(features=6, width=24, depth=3, heads=2, dropout=0.0)
    config = ParallelConfig(shard=ShardConfig(param_dtype="bfloat16"))
    parallelize(model, build_mesh(MeshConfig(), 1, "cpu"), config)
    model(torch.randn(2, 5, 6), torch.rand(2)).sum().backward()
    assert seen == {"x": torch.bfloat16, "t": torch.float32, "weight": torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
