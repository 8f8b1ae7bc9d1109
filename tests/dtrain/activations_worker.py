"""Run under torchrun: every activation policy under FSDP2 against `none`; writes what differs.

Argument: the file that rank 0 writes.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtrain.activations.policy import ActivationConfig, stash_meter
from dtrain.blocks import find_blocks
from dtrain.dist import process_group
from dtrain.parallelize import ParallelConfig, parallelize
from dtrain.sharding.mesh import MeshConfig, build_mesh
from dtrain.sharding.shard import ShardConfig
from tests.dtrain.activation_models import filled

MIB = 2**20
# torch 2.13 renamed them.
NAMES = ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")
POLICIES = {
    "none": ActivationConfig(),
    "full": ActivationConfig("full"),
    "selective": ActivationConfig("selective"),
    "budget": ActivationConfig("budget", budget_gib=2 / 1024),
    "host": ActivationConfig("full", stash="host"),
    "host, budget": ActivationConfig("budget", budget_gib=2 / 1024, stash="host"),
    "int8": ActivationConfig("full", stash="int8"),
}
RUNS = {
    ("uvit", "float32"): ["full", "selective", "budget", "host", "int8"],
    ("uvit", "bfloat16"): ["selective", "host", "int8"],
    ("tiny_dit", "float32"): ["host, budget"],
}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls of FSDP2's collectives."""
    calls: dict[str, int] = {}
    with ExitStack() as stack:
        spies = {
            name: stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name)))
            for name in NAMES
            if hasattr(dist, name)
        }
        yield calls
        calls |= {name: spy.call_count for name, spy in spies.items()}


def run(name: str, policy: str, param_dtype: Any) -> dict[str, Any]:
    """Two steps of two micro-batches; gradients, all-gathers and choices of the second."""
    model, inputs = filled(name)
    mesh = build_mesh(MeshConfig(), 2, "cpu")
    config = ParallelConfig(activations=POLICIES[policy], shard=ShardConfig(param_dtype=param_dtype))
    model = parallelize(model, mesh, config)
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(1)
        with counted() as calls:
            for _ in range(2):
                loss = model(**inputs).float().square().mean()
                loss.backward()
        meter = stash_meter(model)
        stashed = meter.read()["stash_mib"] * MIB if meter else 0
    forward: Any = find_blocks(model)[0].forward
    choices = [repr(choice) for choice in forward.budget.choices] if hasattr(forward, "budget") else []
    return {
        "loss": loss.detach(),
        "grads": grads(model),
        "calls": calls,
        "stashed": stashed,
        "choices": choices,
    }


def grads(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            found[name] = parameter.grad.full_tensor()
    return found


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """How far a policy's step is from that of `none`, and what else it did."""
    pairs = [(found["grads"][name], grad) for name, grad in wanted["grads"].items()]
    error, norm = (
        sum(float(x.float().square().sum()) for x in xs)
        for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return {
        "same_loss": torch.equal(found["loss"], wanted["loss"]),
        "same_names": found["grads"].keys() == wanted["grads"].keys(),
        "same_grads": all(torch.equal(a, b) for a, b in pairs),
        "distance": (error / norm) ** 0.5,
        "calls": found["calls"],
        "stashed": found["stashed"],
        "choices": found["choices"],
    }  # fmt: skip


def main(out: str) -> None:
    results: dict[str, list[Any]] = {}
    with process_group(60) as world:
        for (name, dtype), policies in RUNS.items():
            wanted = run(name, "none", dtype)
            for policy in ("none", *policies):
                found = wanted if policy == "none" else run(name, policy, dtype)
                gathered: list[Any] = [None] * world.size
                dist.all_gather_object(gathered, compare(found, wanted))
                results[f"{name}-{dtype}-{policy}"] = gathered
        if world.is_main:
            with open(out, "w") as file:
                json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
