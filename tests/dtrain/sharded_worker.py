"""Run under torchrun: trains one step unsharded and sharded, and writes how far they are apart.

Arguments: the file that rank 0 writes, and the models to try.
"""

import copy
import json
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.activations.policy import ActivationConfig
from dtrain.dist import process_group
from dtrain.mesh import MeshConfig, build_mesh, mean_over
from dtrain.parallelize import ParallelConfig, parallelize
from dtrain.shard import ShardConfig
from tests.dtrain.tiny_dit import TinyDiT

BATCH = 4


def tiny_dit() -> tuple[nn.Module, dict[str, Tensor]]:
    inputs = {"x": torch.randn(BATCH, 5, 6), "t": torch.rand(BATCH)}
    return TinyDiT(features=6, width=24, depth=3, heads=2, dropout=0.0), inputs


def uvit() -> tuple[nn.Module, dict[str, Tensor]]:
    import uvit

    model = uvit.build(
        "video_s2", input_size=(2, 4, 4), in_channels=3, width=24, depth=4, heads=2, condition="none"
    )
    return model, {"x": torch.randn(BATCH, 3, 2, 4, 4), "timesteps": torch.rand(BATCH) * 1000}


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


def compare(name: str, policy: str, replicate: int) -> dict[str, object]:
    """One backward pass unsharded on the whole batch, and sharded on each rank's part of it."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():  # zero-initialised gates would hide what is behind them
        torch.nn.init.normal_(parameter, std=0.1)
    rank, world = dist.get_rank(), dist.get_world_size()
    sharded = copy.deepcopy(model)
    loss = _loss(model, inputs)
    loss.backward()

    mesh = build_mesh(MeshConfig(replicate=replicate), world, "cpu")
    config = ParallelConfig(
        activations=ActivationConfig(policy=policy),  # type: ignore[arg-type]
        shard=ShardConfig(extra_units=EXTRA_UNITS.get(name, ())),
    )
    parallelize(sharded, mesh, config)
    share = BATCH // world
    local = {key: value[rank * share : (rank + 1) * share] for key, value in inputs.items()}
    local_loss = _loss(sharded, local)
    local_loss.backward()

    floor = 1e-3 * float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))  # type: ignore[misc]
    gradients = dict(sharded.named_parameters())
    distances = {}
    for key, parameter in model.named_parameters():
        grad = gradients[key].grad
        assert isinstance(grad, DTensor), key
        assert parameter.grad is not None, key
        distances[key] = _distance(grad.full_tensor(), parameter.grad, floor)
    return {
        "loss": _distance(mean_over(mesh, local_loss.detach()), loss.detach()),
        "gradients": distances,
        "sharded_parameters": sum(p.to_local().numel() for p in sharded.parameters()),  # type: ignore[attr-defined]
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main(out: str) -> None:
    results = {}
    with process_group(60) as world:
        for name in MODELS:
            for policy, replicate in (("none", 1), ("full", 1), ("none", world.size)):
                results[f"{name}-{policy}-{replicate}"] = compare(name, policy, replicate)
        if world.is_main:
            with open(out, "w") as file:
                json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
