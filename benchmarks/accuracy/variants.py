"""What is compared, by the names that the results use: how numbers travel, and how they are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from dtrain.activations.policy import ActivationConfig
from dtrain.comm import CommConfig
from dtrain.optim import EMAConfig, Moments, OptimConfig
from dtrain.sharding.precision import Precision

__all__ = ["BASELINE", "VARIANTS", "Variant", "chosen"]

BASELINE = "none"


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        comm: the collectives; a study sets its own `exact_below`.
        ablation: a preset without a part of it.
        extra: trained only where it is asked for by name.
        moments, weights, average: how they are kept, see `dtrain.sharding.precision`.
        activations: what blocks keep for their backward.
    """

    comm: CommConfig = field(default_factory=CommConfig)
    ablation: bool = False
    extra: bool = False
    moments: Moments = "fp32"
    weights: Precision = "fp32"
    average: Precision = "fp32"
    activations: ActivationConfig = field(default_factory=ActivationConfig)

    def optim(self, config: OptimConfig) -> OptimConfig:
        """The study's optimizer, with this variant's precision."""
        return replace(config, moments=self.moments, weights=self.weights)

    def ema(self, config: EMAConfig) -> EMAConfig:
        """The study's averages, likewise."""
        return replace(config, dtype=self.average)

    def words(self) -> dict[str, str]:
        """The fields of its collectives by name; of other tables what it changes, by table and name."""
        kept = {"optim.moments": self.moments, "optim.weights": self.weights, "ema.dtype": self.average}
        plain = _texts(ActivationConfig())
        changed = {name: text for name, text in _texts(self.activations).items() if text != plain[name]}
        return {
            **_texts(self.comm),
            **{name: text for name, text in kept.items() if text != "fp32"},
            **{f"activations.{name}": text for name, text in changed.items()},
        }


def _texts(config: CommConfig | ActivationConfig) -> dict[str, str]:
    return {of.name: str(getattr(config, of.name)) for of in fields(config)}


_INT4, _DELTA = CommConfig(preset="int8-int4"), CommConfig(preset="int4-delta")


def _stash(kind: Literal["int8", "fp8"]) -> ActivationConfig:
    """Of all inputs of blocks, which are small in a study."""
    return ActivationConfig(policy="full", stash=kind, stash_smallest=1)


VARIANTS: Mapping[str, Variant] = {
    BASELINE: Variant(CommConfig()),
    "bf16": Variant(CommConfig(preset="bf16")),
    "int8": Variant(CommConfig(preset="int8")),
    "int8-int4": Variant(_INT4),
    "int4-delta": Variant(_DELTA),
    "int8-int4, no feedback": Variant(replace(_INT4, error_feedback="none"), ablation=True),
    "int8-int4, no rotation": Variant(replace(_INT4, rotation=0), ablation=True),
    "int8-int4, neither": Variant(
        replace(_INT4, error_feedback="none", rotation=0), ablation=True, extra=True
    ),
    "int4-delta, no feedback": Variant(replace(_DELTA, error_feedback="none"), ablation=True, extra=True),
    "int8-int4, two levels": Variant(replace(_INT4, ranks_per_node=2), extra=True),
    "int4-delta, two levels": Variant(replace(_DELTA, ranks_per_node=2), extra=True),
    "int4-delta, int8 reference": Variant(replace(_DELTA, reference="int8"), extra=True),
    "8-bit moments": Variant(moments="8bit", extra=True),
    "bf16 weights": Variant(weights="bf16", extra=True),
    "bf16 average": Variant(average="bf16", extra=True),
    "bf16 weights, 8-bit moments, bf16 average": Variant(
        moments="8bit", weights="bf16", average="bf16", extra=True
    ),
    "int8 stash": Variant(activations=_stash("int8"), extra=True),
    "fp8 stash": Variant(activations=_stash("fp8"), extra=True),
}


def chosen(names: Sequence[str] | None) -> list[str]:
    """Names to train, in the order of the table, the baseline always; all but the extra ones where None.

    Raises:
        ValueError: a name is not in the table.
    """
    for name in names or ():
        if name not in VARIANTS:
            raise ValueError(f"variants = {name!r}: must be of {', '.join(map(repr, VARIANTS))}")
    if names is None:
        return [name for name, variant in VARIANTS.items() if not variant.extra]
    return [name for name in VARIANTS if name in {BASELINE, *names}]
