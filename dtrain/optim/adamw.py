"""AdamW over sharded parameters: one pass that clips, updates and averages, see `dtrain.kernels.adamw`.

Moments are fp32, or eight bits with a scale for each 128 elements of a row of dim 0. All state is sharded
like its parameter, as DTensors, so that a checkpoint stores every shard once and loads on any mesh. Where
rows are cut changes no bit of an update, but for fp32 on the CPU, which is PyTorch's own.

Some parameters keep moments in fp32: small ones, of fewer than 4,096 elements or with rows shorter than a
block, and those of one row, which may be cut along any dim (`dtrain.sharding.placement`).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.kernels.adamw import Hyper, Shard, adamw_, blocks_of_row
from dtrain.kernels.serving import Backend
from dtrain.optim.ema import Average
from dtrain.sharding.local import first_row, local_part, runs

__all__ = ["AdamW", "Moments", "has_codes"]

Moments = Literal["fp32", "8bit"]

_PLAIN = ("exp_avg", "exp_avg_sq")
_CODED = ("exp_avg_codes", "exp_avg_sq_codes", "exp_avg_scale", "exp_avg_sq_scale")


def has_codes(parameter: Tensor, moments: Moments) -> bool:
    """Whether a parameter's moments are codes of eight bits; by its whole shape, the same on every mesh."""
    rows = parameter.dim() > 0 and parameter.shape[0] > 1 and math.prod(parameter.shape[1:]) >= 128
    return moments == "8bit" and parameter.numel() >= 4096 and rows


class AdamW(torch.optim.Optimizer):
    """As `torch.optim.AdamW`, whose state it has when moments are fp32; eight bits have names of their own.

    Args:
        params: fp32 or bf16 parameters or groups of them, plain or DTensors sharded along one dim, those
            with moments of eight bits along dim 0. bf16 ones are rounded by chance.
        lr, betas, eps, weight_decay: as in torch.
        moments: how first and second moments are kept. A run cannot change it.
        seed: of what is rounded by chance; the run's.
        backend: see `dtrain.kernels.adamw.adamw_`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: Moments = "fp32",
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        if moments not in ("fp32", "8bit"):
            raise ValueError(f'moments = {moments!r}: must be "fp32" or "8bit"')
        self.moments: Moments = moments
        self.seed = seed
        self.backend: Backend = backend
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        ema: Average | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew, as in torch; its value is returned.
            grad_scale: one fp32 number that multiplies all gradients, such as the coefficient of clipping.
            ema: averages that take in the updated parameters in the same pass; see `dtrain.optim.ema.EMA.at`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            numbered = dict(enumerate(group["params"], start=number))
            number += len(numbered)
            due = {i: p for i, p in numbered.items() if p.grad is not None}
            for step, parameters in self._by_step(due).items():
                self._update(parameters, _hyper(group, step, ema), grad_scale, ema)
        if ema is not None:
            # No update has averaged in those without a gradient.
            ema.take_in(p for p in ema.shards if p.grad is None)
        return loss

    def make_state(self) -> None:
        """Make the state of every parameter that has none: a step does it for those with a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = _fresh_state(parameter, has_codes(parameter, self.moments))

    def _by_step(self, parameters: Mapping[int, nn.Parameter]) -> dict[int, dict[int, nn.Parameter]]:
        """Count one update more for each, and part them by the count."""
        if not parameters:
            return {}
        for parameter in parameters.values():
            if not self.state[parameter]:
                self.state[parameter] = _fresh_state(parameter, has_codes(parameter, self.moments))
        torch._foreach_add_([self.state[p]["step"] for p in parameters.values()], 1)
        parted: dict[int, dict[int, nn.Parameter]] = defaultdict(dict)
        for number, parameter in parameters.items():
            parted[int(self.state[parameter]["step"])][number] = parameter
        return parted

    def _update(
        self,
        parameters: Mapping[int, nn.Parameter],
        how: Hyper,
        grad_scale: Tensor | None,
        ema: Average | None,
    ) -> None:
        averages = {} if ema is None else ema.shards
        shards = [
            _local_shard(number, parameter, self.state[parameter], averages.get(parameter))
            for number, parameter in parameters.items()
        ]
        grads = [local_part(p.grad) for p in parameters.values() if p.grad is not None]
        if grad_scale is not None:
            grad_scale = grad_scale.to(grads[0].device)  # gradients may be on the host
        backend = self.backend
        if backend == "auto" and self.moments == "8bit" and grads[0].device.type == "cpu":
            # PyTorch's fused AdamW rounds the last elements of a shard in another way than the rest.
            backend = "reference"
        adamw_(shards, grads, how, seed=self.seed, grad_scale=grad_scale, backend=backend)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave.

        Raises:
            ValueError: it comes from an optimizer that keeps its moments in another way.
        """
        # torch's own would cast all state to the parameter's dtype, codes included.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        ours = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(saved, ours, strict=True):
            if state := state_dict["state"].get(number):
                self._check_state(number, parameter, state)
                device = parameter.device
                self.state[parameter] = {
                    name: value.to("cpu" if name == "step" else device) for name, value in state.items()
                }

    def _check_state(self, number: int, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        wanted = {"step", *(_CODED if has_codes(parameter, self.moments) else _PLAIN)}
        if set(state) != wanted:
            raise ValueError(
                f"moments = {self.moments!r} needs {', '.join(sorted(wanted))} of parameter {number}, but "
                f"{', '.join(sorted(state))} is given: moments cannot change in a run."
            )


def _hyper(group: Mapping[str, Any], step: int, ema: Average | None) -> Hyper:
    beta1, beta2 = group["betas"]
    weight = 0.0 if ema is None else ema.weight
    return Hyper(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], step, weight)


def _fresh_state(parameter: nn.Parameter, coded: bool) -> dict[str, Tensor]:
    # On the CPU, where the count is needed: reading it waits for no GPU.
    state = {"step": torch.zeros((), dtype=torch.float32)}
    if not coded:
        return state | {name: torch.zeros_like(parameter, dtype=torch.float32) for name in _PLAIN}
    codes = {name: torch.zeros_like(parameter, dtype=torch.uint8) for name in _CODED[:2]}
    return state | codes | {name: _fresh_scales(parameter) for name in _CODED[2:]}


def _fresh_scales(parameter: nn.Parameter) -> Tensor:
    """Zeros (R, K), sharded along R like the parameter."""
    blocks = blocks_of_row(math.prod(parameter.shape[1:]))
    rows = local_part(parameter).shape[0]
    scales = torch.zeros(rows, blocks, dtype=torch.bfloat16, device=parameter.device)
    if not isinstance(parameter, DTensor):
        return scales
    return DTensor.from_local(
        scales,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size((parameter.shape[0], blocks)),
        stride=(blocks, 1),
    )


def _local_shard(
    number: int, parameter: nn.Parameter, state: Mapping[str, Tensor], average: Tensor | None
) -> Shard:
    coded = _CODED[0] in state
    names = _CODED if coded else _PLAIN
    return Shard(
        local_part(parameter),
        **{name.replace("_codes", ""): local_part(state[name]) for name in names},
        ema=None if average is None else local_part(average),
        first_row=first_row(parameter) if coded else 0,
        number=number,
        runs=None if coded else runs(parameter),
    )
