"""Sharded on two real ranks equals unsharded, for our model and for models that know nothing of dtrain."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from dtrain.activations.policy import ActivationConfig
from dtrain.parallelize import CompileConfig, ParallelConfig, parallelize
from dtrain.sharding.mesh import MeshConfig, build_mesh
from dtrain.sharding.placement import placement, shard_numel
from dtrain.sharding.shard import ShardConfig
from tests.dtrain import sharded_worker
from tests.launch import torchrun

MODELS = ["tiny_dit", "uvit", "uvit_windows", "diffusers_dit", "diffusers_wan"]


def distances(folder: Path, ranks: int, *arguments: str) -> dict[str, dict]:
    out = folder / "distances.json"
    torchrun(ranks, Path(sharded_worker.__file__), out, *arguments)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return distances(tmp_path_factory.mktemp("two"), 2, "1,2")


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Two replicas of two shards each."""
    return distances(tmp_path_factory.mktemp("four"), 4, "2", "tiny_dit", "uvit")


def assert_equal(result: dict) -> None:
    assert result["loss"] < 1e-6
    assert len(result["gradients"]) > 10
    assert max(result["gradients"].values()) < 1e-5, result["gradients"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("replicate", [1, 2])
def test_loss_and_every_gradient_equal(two_ranks: dict, name: str, policy: str, replicate: int) -> None:
    assert_equal(two_ranks[f"{name}-{policy}-{replicate}"])


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tiny_dit", "uvit"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_replicate_times_shard(four_ranks: dict, name: str, policy: str) -> None:
    result = four_ranks[f"{name}-{policy}-2"]
    assert_equal(result)
    assert result["sharded_parameters"] <= 0.52 * result["parameters"]


@pytest.mark.distributed
def test_a_table_of_one_row_is_cut_along_another_dim(two_ranks: dict, four_ranks: dict) -> None:
    for results, replicate, cut in ((two_ranks, 1, "S(2)"), (two_ranks, 2, "S(0)"), (four_ranks, 2, "S(2)")):
        cuts = results[f"uvit-none-{replicate}"]["cut"]
        assert cuts.pop("pos_embed") == cut
        assert set(cuts.values()) == {"S(0)"}


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"),
    [
        ((1, 130, 128), 1, 0),
        ((1, 130, 128), 2, 1),
        ((1, 130, 128), 4, 2),
        ((1, 130, 128), 3, 0),  # divides neither
        ((1, 127, 128), 2, 0),  # small
        ((2, 130, 128), 4, 0),
        ((1, 2**14), 8, 1),
        ((2**14,), 8, 0),
        ((), 8, 0),
    ],
)
def test_where_a_parameter_is_cut(shape: tuple[int, ...], ranks: int, dim: int) -> None:
    parameter = torch.empty(shape, device="meta")
    assert placement(parameter, ranks) == Shard(dim)
    parts = torch.empty(shape or (1,)).chunk(ranks, dim)
    assert shard_numel(parameter, ranks) == parts[0].numel()


@pytest.mark.distributed
@pytest.mark.parametrize("reduce_each", [True, False])
def test_accumulated_gradients_equal_those_of_the_whole_batch(two_ranks: dict, reduce_each: bool) -> None:
    assert_equal(two_ranks[f"accumulated-{reduce_each}"])


@pytest.mark.distributed
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_holds_its_share_of_the_parameters(two_ranks: dict, name: str) -> None:
    sharded = two_ranks[f"{name}-none-1"]
    assert sharded["sharded_parameters"] <= 0.52 * sharded["parameters"]
    replicated = two_ranks[f"{name}-none-2"]
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


def test_compiled_blocks_give_the_same_gradients(single_process_group: None) -> None:
    plain, inputs = sharded_worker._filled("tiny_dit")
    compiled = copy.deepcopy(plain)
    config = ParallelConfig(activations=ActivationConfig(policy="full"), compile=CompileConfig(enabled=True))
    parallelize(compiled, build_mesh(MeshConfig(), 1, "cpu"), config)
    for model in (plain, compiled):
        sharded_worker._loss(model, inputs).backward()
    assert max(sharded_worker._gradient_distances(compiled, plain).values()) < 1e-5
