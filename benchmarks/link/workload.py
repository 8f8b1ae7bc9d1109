"""What is trained between the hosts: a U-ViT with so few tokens that communication is most of a step.

A step moves 6 bytes a parameter (`FORMULA_BYTES`) and computes 6 FLOPs a parameter and token, so that tokens
alone decide what bounds it. Variants share weights, data, optimizer and compute dtype (bf16), and differ in
what travels.
"""

from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch

import uvit
from dtrain.comm.config import Preset
from uvit import UViTConfig

__all__ = [
    "BASELINES",
    "FORMULA_BYTES",
    "PRESETS",
    "VARIANTS",
    "Job",
    "ReduceDtype",
    "Workload",
    "check_variants",
    "how",
]

ReduceDtype = Literal["float32", "bfloat16"]

PRESETS: tuple[Preset, ...] = tuple(p for p in get_args(Preset) if p != "none")
VARIANTS: tuple[str, ...] = ("fsdp2-fp32", "fsdp2-bf16", *PRESETS)
BASELINES = ("fsdp2-bf16", "bf16")
"""What nobody would call compressed: the faster one at a rate is what speed-ups refer to."""

FORMULA_BYTES = 6.0
"""Bytes of a parameter and step in FSDP2 with bf16 throughout, by rings, times (W - 1) / W: weights gathered
for the forward and for the backward, gradients reduced."""


def how(variant: str) -> tuple[Preset, ReduceDtype]:
    """The preset of the compressed collectives, and the dtype that FSDP2 hands gradients over in."""
    if variant == "fsdp2-fp32":
        return "none", "float32"
    return ("none" if variant == "fsdp2-bf16" else cast(Preset, variant)), "bfloat16"


def check_variants(variants: tuple[str, ...]) -> None:
    """Raises ValueError for a variant that there is not, or where no baseline is among them."""
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(
                f"variants = {variant!r}: there is none of this name; there are {', '.join(VARIANTS)}"
            )
    if not set(BASELINES) & set(variants):
        raise ValueError(
            f"variants = {' '.join(variants)}: add one of the baselines, {' or '.join(BASELINES)}"
        )


@dataclass(frozen=True)
class Workload:
    """The model and its batch, of which every host has one."""

    width: int = field(default=768, metadata={"help": "features of a token"})
    depth: int = field(default=12, metadata={"help": "in and out blocks; there is one more"})
    heads: int = field(default=12, metadata={"help": "attention heads"})
    side: int = field(default=8, metadata={"help": "height and width of the latents, in patches of 2 × 2"})
    batch: int = field(default=2, metadata={"help": "samples of a host"})

    @property
    def config(self) -> UViTConfig:
        """Of the model; raises ValueError where the sizes do not fit each other."""
        return UViTConfig(
            input_size=(1, self.side, self.side),
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            final_conv=False,
        )

    def host_bytes(self, variants: int, hosts: int) -> int:
        """Memory of a host, about: all variants' shards, residuals and copies of weights, and PyTorch."""
        with torch.device("meta"):
            parameters = sum(p.numel() for p in uvit.build(self.config).parameters())
        # fp32 weights and moments; of presets, 1 and 2 bytes of each unsharded parameter at most; while a
        # step runs, gathered weights and gradients.
        kept = variants * (12 / hosts + 1.5)
        return int(0.7 * 2**30 + parameters * (kept + 6))

    @property
    def tokens(self) -> int:
        """Of a host and step, the time's included."""
        return self.batch * ((self.side // 2) ** 2 + 1)


TINY = Workload(width=256, depth=2, heads=4)


@dataclass(frozen=True)
class Job:
    """What one start of `worker` measures, at one rate."""

    workload: Workload
    variants: tuple[str, ...]
    least_rounds: int
    """Measured rounds, whatever they take; each runs every variant once."""
    most_rounds: int
    seconds: float
    """How long the measured rounds may take, as far as the warm-up tells."""
    sampled: bool
    """One more step of each preset at the end, of which quantisation errors and codec times are taken."""
    profile: bool
    """And one under torch.profiler, of which rank 0 keeps the table."""
    out: str
    """Folder of the results, rank0.json and so on."""
