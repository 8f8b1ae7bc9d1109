"""The gate: a rung that does not round trains the plain model's function, or its times do not count.

On one real rank, at a tiny size, with one set of weights: the loss and all gradients as one vector g are held
against B1's in fp32, |g - g'| / |g|. What bf16 costs there is measured, not guessed: a rung may be off by 2.5
times what B1 under autocast is, whose residual stream stays in fp32, and by a twentieth at most.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.ladder.result import Gate
from benchmarks.ladder.rungs import RUNGS, Rung
from benchmarks.ladder.training import Dtype, start
from benchmarks.ladder.workloads import Workload
from dtrain.dist import process_group
from dtrain.sharding.local import local_part

__all__ = ["check"]

_SLACK, _MOST = 2.5, 0.05
_EXACT = 1e-5


class _Answer(NamedTuple):
    loss: Tensor
    gradient: Tensor  # of all parameters, in one vector


def check(
    workload: Workload, rungs: Sequence[str], device: torch.device, dtype: Dtype = "bfloat16"
) -> tuple[Gate, ...]:
    """Hold rungs against B1 in fp32. No process group may be up.

    Args:
        workload: a small one.
        rungs: names; those that round are passed over.
        device: that computes.
        dtype: of compute; the limit of fp32 is 1e-5.
    """
    names = dict.fromkeys(["B1", *(name for name in rungs if not RUNGS[name].rounds)])
    with process_group():
        weights, exact = _reference(workload, device)
        answers = {name: _answer(workload, RUNGS[name], device, dtype, weights) for name in names}
    errors = {name: _errors(answer, exact) for name, answer in answers.items()}
    limit = _EXACT if dtype == "float32" else min(_MOST, _SLACK * errors["B1"][1])
    return tuple(
        Gate(workload.name, name, loss, gradient, limit, max(loss, gradient) <= limit)
        for name, (loss, gradient) in errors.items()
    )


def _reference(workload: Workload, device: torch.device) -> tuple[dict[str, Tensor], _Answer]:
    training = start(workload, RUNGS["B1"], 1, device, "float32")
    weights = {name: p.detach().clone() for name, p in _parameters(training.model).items()}
    return weights, _Answer(training.gradients(), _gradient(training.model, list(weights)))


def _answer(
    workload: Workload, rung: Rung, device: torch.device, dtype: Dtype, weights: dict[str, Tensor]
) -> _Answer:
    # Tiny inputs are put away as well.
    rung = replace(rung, activations=replace(rung.activations, stash_smallest=1))
    training = start(workload, rung, 1, device, dtype)
    with torch.no_grad():
        for name, parameter in _parameters(training.model).items():
            # Ours keeps the kernel of patches of one frame as an image's.
            local_part(parameter).copy_(weights[name].reshape(parameter.shape))
    return _Answer(training.gradients(), _gradient(training.model, list(weights)))


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def _gradient(model: nn.Module, names: Sequence[str]) -> Tensor:
    parameters = _parameters(model)
    grads = (parameters[name].grad for name in names)
    return torch.cat([local_part(grad).flatten() for grad in grads if grad is not None])


def _errors(answer: _Answer, exact: _Answer) -> tuple[float, float]:
    loss = (answer.loss - exact.loss).abs() / exact.loss.abs()
    gradient = (answer.gradient - exact.gradient).norm() / exact.gradient.norm()
    return float(loss), float(gradient)
