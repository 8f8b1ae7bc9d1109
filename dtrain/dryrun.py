"""What a run would be, without running it: the model on meta, one batch of data, and bytes by arithmetic.

FSDP2 splits each parameter along one dim (`dtrain.sharding.placement`) into equal chunks, the last ones
short or empty, so rank 0 of a shard group holds the most of any rank.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from dtrain.blocks import find_blocks
from dtrain.comm.config import Scheme, scheme_of
from dtrain.config import RunConfig, build_recipe, check_world
from dtrain.kernels.adamw import moments_bytes
from dtrain.metrics.flops import training_flops
from dtrain.optim import Moments, has_codes
from dtrain.recipe import DataState, Recipe
from dtrain.sharding.placement import shard_numel
from dtrain.sharding.precision import DTYPES, Precision, convert_weights
from dtrain.swap.attention import swap_attention
from dtrain.swap.fusion import swap_fused


@dataclass(frozen=True)
class StateBytes:
    """Persistent bytes on the fullest rank; activations and gathered parameters come on top."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.ema


def state_bytes(
    model: nn.Module, shard: int, *, ema: bool, moments: Moments = "fp32", average: Precision = "fp32"
) -> StateBytes:
    """Bytes of sharded parameters, gradients, AdamW moments and EMA on the first of `shard` ranks.

    Args:
        model: unsharded, may be on meta; its parameters have the dtype of their shards, see
            `dtrain.sharding.precision.convert_weights`.
        shard: size of the mesh's shard axis.
        ema: whether averages are kept.
        moments: how AdamW keeps its own.
        average: how averages are kept.
    """
    local = {name: shard_numel(p, shard) * p.element_size() for name, p in model.named_parameters()}
    trained = {name: shard_numel(p, shard) for name, p in model.named_parameters() if p.requires_grad}
    gradients = sum(local[name] for name in trained)
    averages = sum(trained.values()) * DTYPES[average].itemsize if ema else 0
    kept = sum(_moments(p, shard, moments) for p in model.parameters() if p.requires_grad)
    return StateBytes(sum(local.values()), gradients, kept, averages)


def _moments(parameter: nn.Parameter, shard: int, moments: Moments) -> int:
    numel, row = shard_numel(parameter, shard), math.prod(parameter.shape[1:])
    coded = has_codes(parameter, moments)
    return moments_bytes(numel // row, row, coded) if coded else moments_bytes(1, numel, coded)


def dry_run(config: RunConfig, world: int) -> list[tuple[str, str]]:
    """Check everything that can be checked in one process, and say what the run would be.

    Args:
        config: of the run.
        world: number of ranks that it is to have.

    Returns:
        (what, value) rows for people.

    Raises:
        ValueError: what a real run would raise as well.
    """
    check_world(config, world)
    recipe = build_recipe(config)
    with torch.device("meta"):
        model = recipe.build()
    convert_weights(model, config.optim.weights)
    blocks = find_blocks(model, recipe.blocks(model) if recipe.blocks else None)
    replicate, shard = config.mesh.sizes(world)
    held = state_bytes(
        model, shard, ema=config.ema.enabled, moments=config.optim.moments, average=config.ema.dtype
    )
    accumulation = config.train.accumulation(world)
    return [
        ("run folder", str(config.run_dir)),
        ("model", f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"),
        ("blocks", _block_names(model, blocks)),
        ("attention", _attention(model, config)),
        ("norms and MLPs", _fusion(model, config)),
        ("mesh", f"{world} ranks = replicate {replicate} x shard {shard}"),
        (
            "batch",
            f"{config.train.global_batch} = {config.train.micro_batch} per rank x {world} ranks x "
            f"{accumulation} micro-batches",
        ),
        ("communication", _communication(model, config, shard, accumulation)),
        *_work_rows(recipe, config, world * accumulation, world),
        ("state per rank", _state(held, config)),
    ]


def _state(held: StateBytes, config: RunConfig) -> str:
    parts = [
        f"parameters {_size(held.parameters)} ({config.optim.weights})",
        f"gradients {_size(held.gradients)}",
        f"AdamW {_size(held.optimizer)} (moments {config.optim.moments})",
        f"EMA {_size(held.ema)}" + (f" ({config.ema.dtype})" if held.ema else ""),
    ]
    where = ", on the host (shard.cpu_offload)" if config.shard.cpu_offload else ""
    return f"{_size(held.total)} = {' + '.join(parts)}{where}"


def _attention(model: nn.Module, config: RunConfig) -> str:
    wanted = config.attention
    if not wanted.swap:
        return "the model's own"
    return f"{swap_attention(model, wanted.backend)} (backend {wanted.backend})"


def _fusion(model: nn.Module, config: RunConfig) -> str:
    wanted = config.fusion
    if not wanted.swap:
        return "the model's own"
    return f"{swap_fused(model, wanted.backend)} (backend {wanted.backend})"


def _communication(model: nn.Module, config: RunConfig, shard: int, accumulation: int) -> str:
    """What a rank sends in a step over the shard axis."""
    preset, numbers = config.comm.preset, sum(p.numel() for p in model.parameters())
    if preset == "auto":
        return "auto: chosen at the start, when links and codecs are measured"
    if shard == 1:
        return "none on the shard axis, which has one rank"
    sums = accumulation if config.shard.reduce_each_micro_batch else 1

    def sent(scheme: Scheme | None) -> str:
        return _size(scheme.wire_bytes(numbers, shard, accumulation, sums)) if scheme else ""

    plain, scheme = sent(scheme_of(config.comm, "bf16")), scheme_of(config.comm, preset)
    if scheme is None:
        return f"FSDP2's own collectives; in bf16 throughout {plain} a rank and step"
    return f"{preset}: {sent(scheme)} a rank and step, in bf16 throughout {plain}"


def _block_names(model: nn.Module, blocks: list[nn.Module]) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    kinds = sorted({type(block).__name__ for block in blocks})
    return f"{len(blocks)} x {', '.join(kinds)}: {names[id(blocks[0])]} … {names[id(blocks[-1])]}"


def _work_rows(recipe: Recipe, config: RunConfig, passes: int, world: int) -> list[tuple[str, str]]:
    """Tokens and FLOPs of a step, scaled from the first micro-batch of rank 0."""
    state = DataState(config.seed, 0, config.train.micro_batch)
    batch = next(iter(recipe.data(0, world, state)))
    work = training_flops(recipe.flops(batch)) * passes
    rows = [("training FLOPs", f"{work / 1e12:,.4g} TFLOP per step, {work / world / 1e12:,.4g} per rank")]
    if recipe.tokens:
        rows.insert(0, ("tokens", f"{recipe.tokens(batch) * passes:,} per step"))
    return rows


def _size(count: int) -> str:
    return f"{count / 1024**3:,.2f} GiB" if count >= 1024**3 else f"{count / 1024**2:,.2f} MiB"
