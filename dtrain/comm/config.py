"""What travels between ranks, and in which bits: the `[comm]` table and the schemes that its presets name.

Sharded training moves each parameter three times a step: gathered for the forward, gathered again for the
backward, its gradient summed into its shard. Bytes of a parameter and step, times (W - 1) / W on W ranks:

    preset       forward  backward  gradient   sum
    bf16           2         2         2       6
    int8           1.01      1.01      1.02    3.03
    int8-int4      1.01      1.01      0.52    2.53
    int4-delta     0.51      0         0.52    1.02

Sources: Wang et al., "ZeRO++", arXiv 2306.10209; Jia et al., "SDP4Bit", arXiv 2410.15526 (differences of
weights, two levels, rotations); Xie et al., "LoCo", arXiv 2407.04480 (error feedback of four-bit gradients).
"""

from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from dtrain.comm.codec import Cast, Codec, Quantised
from dtrain.kernels.payload import Format

Preset = Literal["none", "bf16", "int8", "int8-int4", "int4-delta", "auto"]
Storage = Literal["none", "int8", "bf16"]
PRESETS: tuple[Preset, ...] = get_args(Preset)

# Weights of a matrix are alike in size, so that their blocks may be larger: 8.06 and 4.06 bits an element.
_WEIGHTS_BLOCK = 256
_GRADIENTS_BLOCK = 128


@dataclass(frozen=True)
class CommConfig:
    """How parameters and gradients travel between ranks."""

    preset: Preset = field(
        default="none",
        metadata={
            "help": "none: FSDP2's own. bf16: sums in fp32. int8: weights and gradients. int8-int4: "
            "gradients in 4 bits, with error feedback. int4-delta: and of weights only the change since the "
            "last step, which costs each rank a whole copy of the weights. auto: measured at the start."
        },
    )
    error_feedback: Literal["auto", "none", "int8", "bf16"] = field(
        default="auto",
        metadata={
            "help": "What rounding took from a gradient is added to the next; how it is kept, in 1 or 2 "
            "bytes an unsharded parameter. auto: int8 where gradients have 4 bits, else none."
        },
    )
    rotation: Literal[0, 32, 64, 128] = field(
        default=32,
        metadata={"help": "Order of the Hadamard transform of 4-bit gradients, against outliers; 0: none."},
    )
    exact: tuple[str, ...] = field(
        default=(), metadata={"help": "Globs of parameters that travel uncompressed."}
    )
    exact_below: int = field(
        default=16384, metadata={"help": "Parameters with fewer elements travel uncompressed."}
    )
    inside: Literal["auto", "bf16", "int8"] = field(
        default="auto",
        metadata={
            "help": "Gradients between the ranks of a node, where others of the same sum leave it; "
            "auto: int8, or bf16 with the preset bf16."
        },
    )
    ranks_per_node: int = field(
        default=0, metadata={"help": "Ranks joined by fast links; 0: as torchrun started them on a machine."}
    )
    reference: Literal["bf16", "int8"] = field(
        default="bf16", metadata={"help": "How int4-delta keeps the copy of the weights: 2 or 1 bytes each."}
    )

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(CommConfig).items():
            allowed = get_args(hint) if get_origin(hint) is Literal else ()
            if allowed and getattr(self, name) not in allowed:
                raise ValueError(
                    f"comm.{name} = {getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}."
                )
        for name in ("exact_below", "ranks_per_node"):
            if getattr(self, name) < 0:
                raise ValueError(f"comm.{name} = {getattr(self, name)}: must be 0 or more.")


@dataclass(frozen=True)
class Scheme:
    """What a preset means.

    Args:
        preset: its name.
        weights: codec of gathered parameters, or of their changes.
        delta: gather changes against a reference that all ranks hold.
        gradients: codec of gradients on links between nodes, or on the only links.
        inside: codec of gradients on links within a node that lie before those.
        feedback: how the residual of `gradients` is kept.
        reference: how the reference is kept.
    """

    preset: Preset
    weights: Codec
    delta: bool
    gradients: Codec
    inside: Codec
    feedback: Storage = "none"
    reference: Literal["bf16", "int8"] = "bf16"

    def wire_bytes(self, numbers: int, ranks: int, passes: int = 1, sums: int = 1) -> int:
        """Bytes that a rank sends in a step over one axis of `ranks`, if no parameter is exact.

        Args:
            numbers: parameters of the whole model.
            passes: forwards and backwards of a step.
            sums: how often gradients are summed.
        """
        mine = -(-numbers // ranks)
        gathers = 1 if self.delta else 2 * passes
        message = gathers * self.weights.wire_bytes(mine) + sums * self.gradients.wire_bytes(mine)
        return message * (ranks - 1)


def scheme_of(config: CommConfig, preset: Preset) -> Scheme | None:
    """The scheme of a preset other than "auto"; None for "none"."""
    if preset == "none":
        return None
    int8, bf16 = Quantised(Format("int8", _GRADIENTS_BLOCK)), Cast(torch.bfloat16)
    if preset == "bf16":
        return Scheme(preset, bf16, False, bf16, bf16, _storage(config, 16))
    inside = bf16 if config.inside == "bf16" else int8
    if preset == "int8":
        weights = Quantised(Format("int8", _WEIGHTS_BLOCK))
        return Scheme(preset, weights, False, int8, inside, _storage(config, 8))
    delta = preset == "int4-delta"
    return Scheme(
        preset,
        weights=Quantised(Format("int4" if delta else "int8", _WEIGHTS_BLOCK)),
        delta=delta,
        gradients=Quantised(Format("int4", _GRADIENTS_BLOCK, config.rotation)),
        inside=inside,
        feedback=_storage(config, 4),
        reference=config.reference,
    )


def _storage(config: CommConfig, bits: int) -> Storage:
    if bits == 16:
        return "none"
    if config.error_feedback == "auto":
        return "int8" if bits == 4 else "none"
    return config.error_feedback
