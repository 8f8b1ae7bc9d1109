"""The rungs: four baselines in plain PyTorch, then what dtrain adds, one remedy after another."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dtrain.activations.policy import ActivationConfig
from dtrain.optim import EMAConfig, OptimConfig

__all__ = ["RUNGS", "Rung"]

_CHUNKS = 4


@dataclass(frozen=True)
class Rung:
    """One way to train.

    Attributes:
        title: for people.
        base: plain PyTorch's "ddp" or "fsdp2", or dtrain's own.
        checkpointing: of every block; for the baselines.
        activations, optim, ema: of a run's config, for dtrain's.
        rounds: whether it changes numbers, for fewer bits.
    """

    title: str
    base: Literal["ddp", "fsdp2", "dtrain"] = "dtrain"
    checkpointing: bool = False
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    rounds: bool = False


def _ours(title: str, rounds: bool = False, optim: Any = None, ema: Any = None, **activations: Any) -> Rung:
    configs = ActivationConfig(**activations), OptimConfig(**optim or {}), EMAConfig(**ema or {})
    return Rung(title, "dtrain", False, *configs, rounds)


_CHUNKED: dict[str, Any] = {"policy": "full", "mlp_chunks": _CHUNKS}
_HOST: dict[str, Any] = _CHUNKED | {"stash": "host"}
_FEWER: dict[str, Any] = {"optim": {"moments": "8bit"}, "ema": {"dtype": "bf16"}}
_FEWEST: dict[str, Any] = {"optim": {"moments": "8bit", "weights": "bf16"}, "ema": {"dtype": "bf16"}}

RUNGS: Mapping[str, Rung] = {
    "B1": Rung("DDP, autocast to bf16", "ddp"),
    "B2": Rung("B1 + checkpointing: the authors' recipe", "ddp", checkpointing=True),
    "B3": Rung("FSDP2 in bf16", "fsdp2"),
    "B4": Rung("B3 + checkpointing", "fsdp2", checkpointing=True),
    "none": _ours("dtrain: split skips, fused kernels; keeps all", policy="none"),
    "selective": _ours("… keeps attention's outputs", policy="selective"),
    "full": _ours("… keeps block inputs", policy="full"),
    "chunks": _ours(f"full + MLPs in {_CHUNKS} pieces", **_CHUNKED),
    "fp8": _ours("chunks + block inputs in fp8", rounds=True, **_CHUNKED, stash="fp8"),
    "host": _ours("chunks + block inputs on the host", **_HOST),
    "host-8bit": _ours("host + 8-bit moments, bf16 average", rounds=True, **_FEWER, **_HOST),
    "host-bf16": _ours("host-8bit + bf16 weights", rounds=True, **_FEWEST, **_HOST),
}
