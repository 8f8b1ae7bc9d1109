"""A plan for people: rows of a table, and a record for programs."""

from typing import Any

from dtrain.plan.peak import KINDS, kind_of
from dtrain.plan.plan import CONTEXT, FRAGMENTS, Plan

__all__ = ["record", "rows"]


def rows(plan: Plan) -> list[tuple[str, str]]:
    """(what, value) for a table."""
    replicate, shard = plan.config.mesh.sizes(plan.gpus)
    kinds, cost = plan.peak.kinds, plan.estimate
    return [
        ("model", f"{plan.simulation.parameters / 1e6:,.1f}M parameters"),
        ("mesh", f"{plan.gpus} x {plan.gpu.name} = replicate {replicate} x shard {shard}"),
        ("peak of a GPU", f"{_gib(plan.peak.nbytes)} of {_gib(plan.room)}, at: {plan.peak.when}"),
        *((f"  {kind}", _gib(kinds[kind])) for kind in KINDS if kinds[kind]),
        ("  largest block", _largest_block(plan)),
        *([("host memory", f"{_gib(plan.peak.host_bytes)} a GPU")] if plan.peak.host_bytes else []),
        ("left out", f"{_gib(CONTEXT)} for CUDA and NCCL, {FRAGMENTS:.0%} for gaps between allocations"),
        ("computes", f"{cost.flops / 1e12:,.1f} TFLOP a GPU and step, recomputation included"),
        ("sends", f"{_gib(cost.wire_bytes)} a GPU and step: {_collectives(plan)}"),
        ("step, estimated", f"{cost.step_s:.3g} s = {_parts(plan)}"),
        ("  assumed", plan.rates.said()),
        *(("padded", line) for line in plan.simulation.padded),
        ("fits", "yes" if plan.fits else "NO"),
        *(("  change", line) for line in plan.advice),
    ]


def record(plan: Plan) -> dict[str, Any]:
    """The same as plain numbers."""
    cost = plan.estimate
    return {
        "gpus": plan.gpus,
        "device": plan.gpu.name,
        "parameters": plan.simulation.parameters,
        "peak_bytes": plan.peak.nbytes,
        "room_bytes": plan.room,
        "host_bytes": plan.peak.host_bytes,
        "peak_when": plan.peak.when,
        "peak_accounts": plan.peak.accounts,
        "flops": cost.flops,
        "wire_bytes": cost.wire_bytes,
        "step_s": cost.step_s,
        "compute_s": cost.compute_s,
        "wire_s": cost.wire_s,
        "exposed_s": cost.exposed_s,
        "update_s": cost.update_s,
        "fits": plan.fits,
        "advice": plan.advice,
    }


def _parts(plan: Plan) -> str:
    cost = plan.estimate
    return (
        f"compute {cost.compute_s:.3g} s, exposed of {cost.wire_s:.3g} s wire {cost.exposed_s:.3g} s, "
        f"update {cost.update_s:.3g} s"
    )


def _collectives(plan: Plan) -> str:
    counts: dict[tuple[str, int], int] = {}
    for sent in plan.simulation.sent:
        counts[sent.kind, sent.ranks] = counts.get((sent.kind, sent.ranks), 0) + 1
    return ", ".join(f"{n} {kind}s of {ranks}" for (kind, ranks), n in counts.items()) or "nothing"


def _largest_block(plan: Plan) -> str:
    blocks = {a: n for a, n in plan.peak.accounts.items() if kind_of(a) != a}
    if not blocks:
        return "none"
    name = max(blocks, key=lambda account: blocks[account])
    return f"{name}: {_gib(blocks[name])}"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:,.2f} MiB"
