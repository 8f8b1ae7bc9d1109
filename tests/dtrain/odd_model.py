"""A small model with all that makes collectives hard: odd sizes, tiny, frozen, unused and tied parameters.

And a table of one row, which 2 ranks cut along dim 1 and 4 along dim 2.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dtrain.sharding.placement import placement

WIDTH, HIDDEN, TABLE, BATCH = 50, 203, 328, 4


def digest(tensor: Tensor) -> str:
    # A clone: FSDP2 cannot free storage that NumPy has looked at.
    numbers = tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    return hashlib.sha256(numbers.cpu().numpy().tobytes()).hexdigest()[:16]


class Block(nn.Module):
    """Notes the weights that it computes with, forward and backward, and lets gradients be tampered with.

    `note` makes what is noted; a digest waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.frozen, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 31)
        self.frozen.requires_grad_(False)
        self.note: Callable[[Tensor], Any] = digest
        self.seen: dict[str, list[Any]] = {"forward": [], "backward": []}
        self.weights: dict[str, Tensor] = {}
        self.tamper: Any = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(self.norm(x) + self.frozen(x))
        self.seen["forward"].append(self.note(self.fc1.weight))
        self.weights = {name: p.detach().clone() for name, p in self.named_parameters()}
        if hidden.requires_grad:
            hidden.register_hook(self._backward)
        return x + self.fc2(nn.functional.gelu(hidden))

    def _backward(self, gradient: Tensor) -> Tensor:
        self.seen["backward"].append(self.note(self.fc1.weight))
        return self.tamper(gradient) if self.tamper else gradient


class Odd(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.embed.weight
        self.table = nn.Parameter((torch.rand(1, WIDTH, TABLE) - 0.5) / 10)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.weights: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.weights = {
            name: p.detach().clone() for name, p in self.named_parameters() if "block" not in name
        }
        x = self.embed(x)
        x = x + 4 * (x @ self.table[0] @ self.table[0].t())  # gradients like those of others
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(depth: int = 3, seed: int = 0) -> Odd:
    torch.manual_seed(seed)
    return Odd(depth)


def sharded(
    world: int,
    replicate: int = 1,
    depth: int = 3,
    dtype: torch.dtype = torch.float32,
    reshard: Any = True,
    device: str = "cpu",
) -> tuple[Odd, DeviceMesh]:
    model = build(depth).to(device)
    if replicate == 1:
        mesh = init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    else:
        sizes = (replicate, world // replicate)
        mesh = init_device_mesh(device, sizes, mesh_dim_names=("replicate", "shard"))
    return apply(model, mesh, dtype, reshard), mesh


def apply(model: Odd, mesh: DeviceMesh, dtype: torch.dtype, reshard: Any = True) -> Odd:
    """FSDP2 on the blocks and the root."""
    ranks = mesh.size(mesh.ndim - 1)
    common: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "shard_placement_fn": lambda parameter: placement(parameter, ranks),
    }
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard, **common)
    fully_shard(model, **common)
    return model


def inputs(rank: int, world: int, step: int = 0) -> Tensor:
    """A rank's part of the step's batch, which is the same for 1, 2 and 4 ranks."""
    batch = torch.randn(4 * BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    return batch.chunk(world)[rank]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).float() - x.roll(1, dims=1)).square().mean()
