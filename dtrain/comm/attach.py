"""Compressed collectives on any FSDP2 module.

    fully_shard(...)                                       # as ever
    comm = attach(model, mesh, CommConfig(preset="int8-int4"))

Needs nothing else of dtrain: the optimizer, clipping, accumulation and checkpoints see what they saw before.
"""

import logging
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dtrain.comm.all_gather import DeltaGather, Session, WeightGather
from dtrain.comm.choose import Choice, choose
from dtrain.comm.config import CommConfig, Preset, Scheme, scheme_of
from dtrain.comm.fsdp import Unit, find_units
from dtrain.comm.meter import Meter
from dtrain.comm.reduce_scatter import GradientReduce, ReplicaReduce
from dtrain.comm.state import CommState
from dtrain.comm.topology import alone, find_levels, leaves_node, node_size

log = logging.getLogger(__name__)

__all__ = ["Comm", "attach", "attached"]

_ATTRIBUTE = "_dtrain_comm"  # of the model: what is attached lives as long as it does


class Comm:
    """The compressed collectives of one model.

    Attributes:
        scheme: its codecs; None for "none".
        meter: what they send, see `Meter.read`.
        state: residuals and references, for a checkpoint.
        said: what was said at the start, line by line.
    """

    def __init__(self, scheme: Scheme | None, meter: Meter, state: CommState, said: list[str]) -> None:
        self.scheme = scheme
        self.meter = meter
        self.state = state
        self.said = said

    @property
    def preset(self) -> Preset:
        """What is in use; what "auto" chose, "auto" itself where it chose two for two axes."""
        return self.scheme.preset if self.scheme else "none"


def attach(model: nn.Module, mesh: DeviceMesh, config: CommConfig) -> Comm:
    """Compress the collectives of every FSDP2 module of a model, in place.

    Every rank calls it, after `fully_shard` and before the first forward; parameters may be meta.

    Args:
        model: with FSDP2 applied, over `mesh`.
        mesh: one axis to shard over, or (replicate, shard).
        config: what travels in which bits.
    Returns: the meter and the state; also `attached(model)`.
    Raises:
        ValueError: the model is not sharded by FSDP2, has collectives attached already, or a glob of
            `comm.exact` matches no parameter.
    """
    if attached(model) is not None:
        raise ValueError("the model has compressed collectives already: attach once.")
    units = find_units(model)
    groups = _Groups(node_size(config.ranks_per_node))
    if config.preset == "auto":
        choice = choose(units, config, groups.levels(units[0].shard_group))
    else:
        choice = Choice(scheme_of(config, config.preset), [])
    scheme, said, meter, state = choice.scheme, choice.said, Meter(), CommState(mesh)
    if scheme is not None:
        said += _attach_scheme(model, units, scheme, config, groups, meter, state)
    if dist.get_rank() == 0:
        for line in said:
            log.info("comm: %s", line)
    comm = Comm(scheme, meter, state, said)
    setattr(model, _ATTRIBUTE, comm)
    return comm


def attached(model: nn.Module) -> Comm | None:
    """What `attach` gave for this model; None where it was not called."""
    return getattr(model, _ATTRIBUTE, None)


def _attach_scheme(
    model: nn.Module,
    units: list[Unit],
    scheme: Scheme,
    config: CommConfig,
    groups: "_Groups",
    meter: Meter,
    state: CommState,
) -> list[str]:
    _check_globs(units, config.exact)
    session = Session(meter)
    _watch_forwards(model, units, session)
    for unit in units:
        _attach_unit(unit, scheme, config, groups, session, state)
    return [*_describe(scheme, units[0], groups), *_describe_exact(units, config)]


class _Groups:
    """Process groups that units share."""

    def __init__(self, per_node: int) -> None:
        self.per_node = per_node
        self._levels: dict[tuple[int, ...], Any] = {}

    @cached_property
    def alone(self) -> dist.ProcessGroup:
        return alone()

    def levels(self, group: dist.ProcessGroup) -> Any:
        ranks = tuple(dist.get_process_group_ranks(group))
        if ranks not in self._levels:
            self._levels[ranks] = find_levels(group, self.per_node)
        return self._levels[ranks]

    def within_node(self, unit: Unit) -> bool:
        """Whether the unit is sharded over a node, and its copies are on several."""
        copies = unit.replicate_group
        return (
            copies is not None
            and leaves_node(copies, self.per_node)
            and not leaves_node(unit.shard_group, self.per_node)
        )


def _attach_unit(
    unit: Unit, scheme: Scheme, config: CommConfig, groups: _Groups, session: Session, state: CommState
) -> None:
    exact = [_is_exact(name, n, config) for name, n in zip(unit.parameters, unit.wholes, strict=True)]
    if scheme.delta:
        gather: WeightGather = DeltaGather(unit, scheme.weights, exact, session, scheme.reference)
    else:
        gather = WeightGather(unit, scheme.weights, exact, session)
    inside = groups.within_node(unit)
    reduce = GradientReduce(
        unit,
        exact,
        codec=scheme.inside if inside else scheme.gradients,
        inside=scheme.inside,
        levels=groups.levels(unit.shard_group),
        feedback="none" if inside else scheme.feedback,
        meter=session.meter,
    )
    divide = unit.take_over(gather, reduce)
    state.add(unit, gather, [reduce.last.residual])
    copies = unit.replicate_group
    if copies is None or copies.size() == 1:
        reduce.divide = divide
    else:
        replicas = ReplicaReduce(
            unit, exact, codec=scheme.gradients, feedback=scheme.feedback, meter=session.meter, group=copies
        )
        replicas.divide = divide
        unit.replace_all_reduce(replicas, groups.alone)
        state.add(unit, None, [replicas.sums.residual, replicas.parts])
    _expect(unit, exact, session.meter)


def _expect(unit: Unit, exact: list[bool], meter: Meter) -> None:
    """Tell the meter which collectives are to be compressed."""
    copies = unit.replicate_group
    trains = any(not exact[i] for i in unit.trainable)
    if unit.shard_group.size() > 1 and not all(exact):
        meter.expect(unit.name, "gather")
        if trains:
            meter.expect(unit.name, "reduce")
    if copies is not None and copies.size() > 1 and trains:
        meter.expect(unit.name, "replicas")


def _watch_forwards(model: nn.Module, units: list[Unit], session: Session) -> None:
    """Note before FSDP2 gathers whether the forward will have a backward: it turns gradients off itself.

    The outermost forward decides. Reentrant checkpointing runs a block without gradients within one that
    has them, and must get the weights that the backward gets.
    """
    outermost: list[nn.Module] = []

    def enter(module: nn.Module, _args: Any) -> None:
        if not outermost:
            outermost.append(module)
            session.training = torch.is_grad_enabled()

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        if outermost == [module]:
            outermost.clear()

    for module in {model, *(cast(nn.Module, unit.module) for unit in units)}:
        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave, always_call=True)


def _is_exact(name: str, numel: int, config: CommConfig) -> bool:
    return numel < config.exact_below or any(fnmatchcase(name, glob) for glob in config.exact)


def _check_globs(units: list[Unit], globs: tuple[str, ...]) -> None:
    names = [name for unit in units for name in unit.parameters]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(
                f"comm.exact: {glob!r} matches no parameter; there are {', '.join(names[:4])} and so on."
            )


def _describe(scheme: Scheme, unit: Unit, groups: _Groups) -> list[str]:
    """What travels how, in words."""
    what = "changes of weights" if scheme.delta else "weights"
    lines = [f"preset {scheme.preset}: {what} as {scheme.weights.name}, gradients as {scheme.gradients.name}"]
    if scheme.feedback != "none":
        lines[0] += f" with error feedback in {scheme.feedback}"
    levels = groups.levels(unit.shard_group)
    if levels:
        lines.append(
            f"gradients in two levels: {levels.places} ranks of a node in {scheme.inside.name}, then "
            f"{levels.nodes} nodes in {scheme.gradients.name}"
        )
    if groups.within_node(unit):
        lines.append(f"gradients within a node in {scheme.inside.name}, between copies as said")
    if unit.shard_group.size() == 1:
        lines.append("the shard axis has one rank: nothing is gathered or scattered")
    return lines


def _describe_exact(units: list[Unit], config: CommConfig) -> list[str]:
    """Which parameters stay in full precision."""
    every = [(name, n) for unit in units for name, n in zip(unit.parameters, unit.wholes, strict=True)]
    exact = [(name, n) for name, n in every if _is_exact(name, n, config)]
    total = sum(n for _, n in every)
    share = 100 * sum(n for _, n in exact) / total
    if len(exact) == len(every):
        return [f"comm.exact_below = {config.exact_below}: all {len(every)} parameters travel exactly"]
    names = ", ".join(name for name, _ in exact) or "none"
    return [f"{len(exact)} of {len(every)} parameters, {share:.2f} % of the numbers, travel exactly: {names}"]
