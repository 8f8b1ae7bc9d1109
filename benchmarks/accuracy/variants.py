"""What is compared: how parameters and gradients travel, by the names that the results use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dtrain.comm import CommConfig

__all__ = ["BASELINE", "VARIANTS", "Variant", "chosen"]

BASELINE = "none"


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        comm: the collectives; a study sets its own `exact_below`.
        ablation: a preset without a part of it.
        extra: trained only where it is asked for by name.
    """

    comm: CommConfig
    ablation: bool = False
    extra: bool = False


_INT4, _DELTA = CommConfig(preset="int8-int4"), CommConfig(preset="int4-delta")

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
