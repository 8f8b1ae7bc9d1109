"""Run under torchrun: one backward pass unsharded and sharded; writes how far they are apart.

Arguments: the file that rank 0 writes, the sizes of the replicate axis to try, the models (all when absent).
"""

import copy
import json
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtrain.activations.policy import ActivationConfig
from dtrain.dist import process_group
from dtrain.parallelize import ParallelConfig, parallelize
from dtrain.recipe import Recipe
from dtrain.sharding.mesh import MeshConfig, build_mesh, mean_over
from dtrain.sharding.shard import ShardConfig
from dtrain.step import accumulate_gradients
from dtrain.swap.attention import AttentionConfig
from tests.dtrain.tiny_dit import TinyDiT

BATCH = 4


def tiny_dit() -> tuple[nn.Module, dict[str, Tensor]]:
    inputs = {"x": torch.randn(BATCH, 5, 6), "t": torch.rand(BATCH)}
    return TinyDiT(features=6, width=24, depth=3, heads=2, dropout=0.0), inputs


def uvit() -> tuple[nn.Module, dict[str, Tensor]]:
    """Its table of positions, (1, 129, 128), is large enough to be cut along another dim, the last."""
    import uvit

    model = uvit.build(
        "video_s2", input_size=(2, 16, 16), in_channels=3, width=128, depth=2, heads=2, condition="none",
        positions="learned",
    )  # fmt: skip
    return model, {"x": torch.randn(BATCH, 3, 2, 16, 16), "timesteps": torch.rand(BATCH) * 1000}


def uvit_windows() -> tuple[nn.Module, dict[str, Tensor]]:
    import uvit

    model = uvit.build(
        "video_s2", input_size=(3, 8, 8), in_channels=3, width=24, depth=2, heads=2, condition="none",
        window=(1, 2, 4), window_tile=(1, 2, 2),
    )  # fmt: skip
    return model, {"x": torch.randn(BATCH, 3, 3, 8, 8), "timesteps": torch.rand(BATCH) * 1000}


def diffusers_dit() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "timestep": torch.arange(BATCH),
        "class_labels": torch.arange(BATCH),
    }
    return model.eval(), inputs  # eval: label dropout draws from the global generator


def diffusers_wan() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 2, 4, 4),
        "timestep": torch.arange(BATCH) * 10,
        "encoder_hidden_states": torch.randn(BATCH, 6, 16),
    }
    return model, inputs


EXTRA_UNITS = {"diffusers_dit": ("transformer_blocks.0.norm1.emb",)}

MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "tiny_dit": tiny_dit,
    "uvit": uvit,
    "uvit_windows": uvit_windows,
    "diffusers_dit": diffusers_dit,
    "diffusers_wan": diffusers_wan,
}


def _loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    output = output if isinstance(output, Tensor) else output.sample
    return F.mse_loss(output, torch.ones_like(output))


def _distance(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """Relative distance; gradients that are zero but for rounding (key biases) are held against `floor`."""
    return float((a - b).norm() / b.norm().clamp_min(floor))


def _filled(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():  # zero-initialised gates would hide what is behind them
        torch.nn.init.normal_(parameter, std=0.1)
    return model, inputs


def _shard(name: str, model: nn.Module, policy: str, replicate: int) -> tuple[nn.Module, DeviceMesh]:
    mesh = build_mesh(MeshConfig(replicate=replicate), dist.get_world_size(), "cpu")
    config = ParallelConfig(
        attention=AttentionConfig(backend="reference"),  # what is compared with keeps its own
        activations=ActivationConfig(policy=policy),  # type: ignore[arg-type]
        shard=ShardConfig(extra_units=EXTRA_UNITS.get(name, ())),
    )
    return parallelize(copy.deepcopy(model), mesh, config), mesh


def _gradient_distances(sharded: nn.Module, model: nn.Module) -> dict[str, float]:
    floor = 1e-3 * float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))  # type: ignore[misc]
    gradients = dict(sharded.named_parameters())
    distances = {}
    for key, parameter in model.named_parameters():
        grad = gradients[key].grad
        assert isinstance(grad, DTensor), key
        assert parameter.grad is not None, key
        distances[key] = _distance(grad.full_tensor(), parameter.grad, floor)
    return distances


def compare(name: str, policy: str, replicate: int) -> dict[str, object]:
    """Unsharded on the whole batch against sharded, each rank on its part of it."""
    model, inputs = _filled(name)
    sharded, mesh = _shard(name, model, policy, replicate)
    loss = _loss(model, inputs)
    loss.backward()

    share = BATCH // dist.get_world_size()
    local = {key: value[dist.get_rank() * share :][:share] for key, value in inputs.items()}
    local_loss = _loss(sharded, local)
    local_loss.backward()
    return {
        "loss": _distance(mean_over(mesh, local_loss.detach()), loss.detach()),
        "gradients": _gradient_distances(sharded, model),
        "sharded_parameters": sum(p.to_local().numel() for p in sharded.parameters()),  # type: ignore[attr-defined]
        "parameters": sum(p.numel() for p in model.parameters()),
        "cut": {name: str(p.placements[-1]) for name, p in sharded.named_parameters()},  # type: ignore[attr-defined]
    }


def compare_accumulated(reduce_each: bool) -> dict[str, object]:
    """The whole batch at once against micro-batches of one sample, accumulated."""
    model, inputs = _filled("tiny_dit")
    sharded, mesh = _shard("tiny_dit", model, "none", 1)
    loss = _loss(model, inputs)
    loss.backward()

    share = BATCH // dist.get_world_size()
    mine = range(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    batches = [{"index": torch.tensor([i])} | {k: v[i : i + 1] for k, v in inputs.items()} for i in mine]
    recipe = Recipe(
        build=lambda: model,
        init=lambda _: None,
        loss=lambda net, batch, _: _loss(net, {key: batch[key] for key in inputs}),
        data=lambda *_: batches,
        flops=lambda _: 0,
    )
    losses = accumulate_gradients(
        sharded, recipe, batches, seed=0, device=torch.device("cpu"), reduce_each=reduce_each
    )
    return {
        "loss": _distance(mean_over(mesh, losses.mean()), loss.detach()),
        "gradients": _gradient_distances(sharded, model),
    }


def main(out: str, replicates: str, *names: str) -> None:
    results = {}
    with process_group(60) as world:
        for name in names or MODELS:
            for replicate in map(int, replicates.split(",")):
                for policy in ("none", "full"):
                    results[f"{name}-{policy}-{replicate}"] = compare(name, policy, replicate)
        for reduce_each in (True, False):
            results[f"accumulated-{reduce_each}"] = compare_accumulated(reduce_each)
        if world.is_main:
            with open(out, "w") as file:
                json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
