"""The seam to FSDP2: all that is read from its insides, in one file.

`FSDPModule.set_custom_all_gather` and `set_custom_reduce_scatter` take objects that FSDP2 calls with flat
buffers and nothing else: not which parameters they hold, nor which pass they serve. A `Unit` tells the rest.
Written against torch 2.11 to 2.13 (`torch/distributed/fsdp/_fully_shard`).
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo, TrainingState
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = [0]  # of this process


def _count_step(*_: Any) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)

__all__ = ["AllGather", "ReduceScatter", "Unit", "find_units"]


def find_units(model: nn.Module) -> list["Unit"]:
    """Every FSDP2 module with parameters of its own, in the order of the tree.

    Raises:
        ValueError: there is none, or one that cannot take collectives of others.
    """
    names = {module: name for name, module in model.named_modules()}
    units = []
    for module, name in names.items():
        groups = _groups(module) if isinstance(module, FSDPModule) else []
        if len(groups) > 1:
            raise ValueError(
                f"{name or 'the model'} shards its parameters over several meshes (shard_placement_fn), "
                "where FSDP2 takes no custom collectives: wrap the parameters of each in a module of its own."
            )
        units += [Unit(cast(FSDPModule, module), group, names) for group in groups]
    if not units:
        raise ValueError(
            "the model has no FSDP2 module: apply fully_shard (or dtrain.sharding.shard) before attach."
        )
    return units


def _groups(module: FSDPModule) -> list[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = state._fsdp_param_group  # torch 2.11
    return [group] if group is not None else []


class Unit:
    """The parameters that FSDP2 gathers and reduces together.

    Attributes:
        name: of the module, "(root)" for the model itself.
        parameters: their names, in the order of FSDP2's buffers.
        numels: elements of this rank's shard of each, padding included: the same on every rank.
        wholes: elements of each whole parameter.
    """

    def __init__(self, module: FSDPModule, group: Any, names: dict[nn.Module, str]) -> None:
        self.module = module
        self.name = names[cast(nn.Module, module)] or "(root)"
        self._group = group
        infos = [p._module_info for p in group.fsdp_params]
        self.parameters = [f"{names[i.module]}.{i.param_name}".lstrip(".") for i in infos]
        self.numels = [p.padded_sharded_param_size.numel() for p in group.fsdp_params]
        self.wholes = [p._orig_size.numel() for p in group.fsdp_params]
        self._reduced: tuple[int, ...] = ()

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks that share one copy of the parameters."""
        group: dist.ProcessGroup = self._group.mesh_info.shard_process_group
        return group

    @property
    def replicate_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same shards in other copies; None where there is one copy."""
        info = self._group.mesh_info
        return info.replicate_process_group if isinstance(info, HSDPMeshInfo) else None

    @property
    def device(self) -> torch.device:
        """Where the parameters are gathered."""
        device: torch.device = self._group.device
        return device

    @property
    def gathered_bytes(self) -> int:
        """Bytes of a number as FSDP2 gathers it."""
        return int((self._group.mp_policy.param_dtype or self._dtype).itemsize)

    @property
    def reduced_bytes(self) -> int:
        """Bytes of a number as FSDP2 sums it."""
        policy = self._group.mp_policy
        return int((policy.reduce_dtype or policy.param_dtype or self._dtype).itemsize)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the shards."""
        dtype: torch.dtype = self._group.fsdp_params[0].sharded_param.dtype
        return dtype

    @property
    def trainable(self) -> tuple[int, ...]:
        """Indices of the parameters that train."""
        return tuple(i for i, p in enumerate(self._group.fsdp_params) if p.sharded_param.requires_grad)

    @property
    def reduced(self) -> tuple[int, ...]:
        """Indices of the parameters whose gradients are in FSDP2's buffer; all have one in most models."""
        return self._reduced

    @property
    def in_backward(self) -> bool:
        """Whether the gather that runs now is for the backward."""
        return bool(self._group._training_state == TrainingState.PRE_BACKWARD)

    def masters(self) -> Tensor:
        """This rank's shards in their own precision, padded, one behind another: a new tensor (Σ numels,)."""
        # Shards on the host are pinned (CPUOffloadPolicy): the copies are in the order of the stream.
        shards = [p._sharded_param_data for p in self._group.fsdp_params]
        return torch.cat([shard.to(self.device, non_blocking=True) for shard in shards])

    def versions(self) -> tuple[int, ...]:
        """Numbers of which one at least changes where parameters are written to in place, or may have been.

        An operation on a DTensor counts for the DTensor alone, one on its local tensor for that alone, and
        one on `.data` for neither; so every step of an optimizer counts as well.
        """
        versions = [_optimizer_steps[0]]
        for p in self._group.fsdp_params:
            versions += [p._sharded_param_data._version, p.sharded_param._version]
        return tuple(versions)

    def shards(self) -> Iterator[tuple[str, int, DTensor]]:
        """Of each parameter its name, where it begins in `masters`, and its sharded DTensor."""
        start = 0
        for name, numel, p in zip(self.parameters, self.numels, self._group.fsdp_params, strict=True):
            yield name, start, getattr(p._module_info.module, p._module_info.param_name)
            start += numel

    def take_over(self, gather: AllGather, reduce: ReduceScatter) -> float:
        """Put our collectives in place of FSDP2's, and leave the division by the ranks to them.

        Returns: what the sum of all ranks' gradients is to be divided by.
        """
        info = self._group.mesh_info
        ranks = info.shard_mesh_size * getattr(info, "replicate_mesh_size", 1)
        divide = float(self._group.gradient_divide_factor or ranks)
        self.module.set_custom_all_gather(gather)
        self.module.set_custom_reduce_scatter(reduce)
        self.module.set_force_sum_reduction_for_comms(True)
        self.module.set_gradient_divide_factor(1.0)
        self._watch_reduced()
        return divide

    def replace_all_reduce(self, hook: Callable[[Tensor], None], alone: dist.ProcessGroup) -> None:
        """Sum over replicas by `hook`, in place, instead of FSDP2's all-reduce.

        That one cannot be exchanged; in a group of one rank (`alone`) it does nothing.
        """
        self._group.mesh_info.replicate_process_group = alone
        self.module.set_all_reduce_hook(hook)

    def _watch_reduced(self) -> None:
        """Note which parameters have gradients before FSDP2 takes these away from them."""
        inner = self._group.post_backward

        def post_backward(*unused: Any) -> None:
            self._reduced = tuple(i for i, p in enumerate(self._group.fsdp_params) if self._has_gradient(p))
            inner(*unused)

        self._group.post_backward = post_backward

    def _has_gradient(self, parameter: Any) -> bool:
        if not hasattr(parameter, "_unsharded_param"):
            return False
        whole = parameter.unsharded_param
        present = parameter.unsharded_accumulated_grad is not None or whole.grad is not None
        filled = getattr(self._group, "reduce_scatter_unused_params", False) and whole.requires_grad
        return bool(present or filled)
