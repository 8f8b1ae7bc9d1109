"""Sharding with FSDP2: each block a unit, the rest of the model one more.

Shards keep the dtype of the parameters (`optim.weights`); parameters are gathered, and compute runs, in
`param_dtype`; gradients are reduced in `reduce_dtype` and kept in that of the parameters
(https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html). Along which dim:
`dtrain.sharding.placement`.

With `cpu_offload` shards, gradients, moments and averages are on the host: FSDP2 copies shards to the device
before it gathers them, and gradients back in the backward; the optimizer runs on the CPU.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from dtrain.sharding.placement import placement, shard_numel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardConfig:
    """Precision, resharding and place of the sharded model."""

    param_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "Dtype of gathered parameters and compute; auto: bfloat16 on CUDA, float32 on CPU."
        },
    )
    reduce_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Dtype in which gradients are summed over ranks."}
    )
    reshard_after_forward: bool = field(
        default=True,
        metadata={"help": "Free gathered parameters after the forward and gather again for the backward."},
    )
    reduce_each_micro_batch: bool = field(
        default=True,
        metadata={
            "help": "Reduce-scatter gradients after every micro-batch (least memory); false: once per step, "
            "holding full gradients in between (least traffic)."
        },
    )
    cpu_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep shards, gradients, moments and averages in the host's memory, pinned, and update "
            "them on the CPU: the last resort, paid with two copies over PCIe a step. Quick with fp32 "
            "throughout only: what is rounded by chance takes many passes on a CPU."
        },
    )
    extra_units: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Globs of modules inside blocks that the model also calls from outside their block; each "
            "is gathered on its own."
        },
    )


def compute_dtype(config: ShardConfig, device_type: str) -> torch.dtype:
    """The dtype in which blocks compute, with `auto` resolved for the device."""
    if config.param_dtype == "auto":
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, config.param_dtype)
    return dtype


def state_device(config: ShardConfig, device: torch.device) -> torch.device:
    """Where shards, gradients, moments and averages are, of a rank that computes on `device`."""
    return torch.device("cpu") if config.cpu_offload else device


def to_empty(model: nn.Module, config: ShardConfig, device: torch.device) -> nn.Module:
    """Give a sharded model on meta memory, in place: parameters where they are kept, buffers on `device`."""
    kept = state_device(config, device)
    model.to_empty(device=kept)
    if kept != device:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_like(buffer, device=device)
    return model


def shard(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, config: ShardConfig) -> None:
    """Apply `fully_shard` in place, blocks first, then the root.

    Args:
        model: parameters may be on the meta device.
        blocks: units that are gathered and freed together.
        mesh: one axis to shard over, or (replicate, shard).
        config: precision, resharding, and where shards are.
    """
    dtype, ranks = compute_dtype(config, mesh.device_type), mesh.size(mesh.ndim - 1)
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=getattr(torch, config.reduce_dtype))
    common: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": _offload_policy(config, mesh),
        "shard_placement_fn": lambda parameter: placement(parameter, ranks),
    }
    for unit in [*_extra_units(model, config.extra_units), *blocks]:
        fully_shard(unit, mp_policy=mixed, reshard_after_forward=config.reshard_after_forward, **common)
    for line in padded_parameters(model, ranks, dtype):
        log.warning("shard: %s", line)
    root = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=mixed.reduce_dtype, cast_forward_inputs=False)
    fully_shard(model, mp_policy=root, **common)
    if dtype != torch.float32:
        _cast_root_inputs(model, dtype)
    _guard_first_forward(model, blocks)
    if mesh.size() > 1 and ranks == 1:
        log.warning("mesh.shard is 1: parameters and optimizer state are replicated, not sharded.")


def _offload_policy(config: ShardConfig, mesh: DeviceMesh) -> OffloadPolicy:
    if config.cpu_offload and mesh.device_type == "cpu":
        log.warning("shard.cpu_offload = true: changes nothing on the CPU, where all is on the host anyway.")
    offloads = config.cpu_offload and mesh.device_type != "cpu"
    return CPUOffloadPolicy() if offloads else OffloadPolicy()


def padded_parameters(model: nn.Module, ranks: int, dtype: torch.dtype) -> list[str]:
    """What FSDP2 pads, in words, a line for each such parameter.

    It pads the dim that it cuts to a multiple of the ranks. Below 64 MiB it is not worth a word.
    """
    found = []
    for name, parameter in model.named_parameters():
        whole = parameter.numel() * dtype.itemsize
        gathered = shard_numel(parameter, ranks) * ranks * dtype.itemsize
        if gathered - whole >= 2**26:
            found.append(
                f"{name} {tuple(parameter.shape)}, {parameter.shape[0]} row(s) for {ranks} ranks: FSDP2 pads "
                f"and gathers {gathered / 2**30:.2f} GiB for {whole / 2**30:.2f}. Share it among fewer ranks "
                "(mesh.replicate), a number that divides one of its dims if it has one row."
            )
    return found


def _cast_root_inputs(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the model's floating inputs to `dtype`, all but per-sample scalars.

    bfloat16 has 8 significant bits: a timestep of 999 would become 1000. Tensors of shape (B,) keep fp32.
    """

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
        return value.to(dtype) if floating else value

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tree_map(cast, args), tree_map(cast, kwargs)

    model.register_forward_pre_hook(hook, with_kwargs=True)


def _extra_units(model: nn.Module, globs: Sequence[str]) -> list[nn.Module]:
    """The modules that the globs name.

    Raises:
        ValueError: a glob matches no module.
    """
    names = dict(model.named_modules())
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = get_close_matches(glob, names, n=3) or list(names)[1:4]
            raise ValueError(f"shard.extra_units: {glob!r} matches no module; near it: {', '.join(near)}.")
    return [module for name, module in names.items() if any(fnmatchcase(name, glob) for glob in globs)]


def _guard_first_forward(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Turn a call into a block from outside it, whose parameters are not gathered then, into a clear error.

    diffusers' DiT does this with the timestep embedding of its first block. The checks go after one forward.
    """
    names = {module: name for name, module in model.named_modules()}

    def check(module: nn.Module, _args: Any) -> None:
        if any(isinstance(p, DTensor) for p in module.parameters(recurse=False)):
            raise ValueError(
                f"{names[module]} belongs to a sharded block but is called from outside it, where its "
                f"parameters are not gathered. Add it, or the module around it that is called, to "
                f"shard.extra_units."
            )

    inner = {module for block in blocks for module in block.modules() if module is not block}
    handles = [
        module.register_forward_pre_hook(check)
        for module in inner
        if any(True for _ in module.parameters(recurse=False)) and not isinstance(module, FSDPModule)
    ]

    def remove(_module: nn.Module, _args: Any, _output: Any) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()

    model.register_forward_hook(remove)
