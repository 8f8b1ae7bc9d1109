"""What a swap did to a model, by layer, and in one sentence."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Swap:
    """What was replaced and what was not; `kept` fills while the model runs."""

    swapped: dict[str, str] = field(default_factory=dict)
    """Layer -> what it was: a class, or a diffusers processor."""
    left: dict[str, str] = field(default_factory=dict)
    """Layer that was not touched -> why."""
    kept: dict[str, set[str]] = field(default_factory=dict)
    """What a layer was, as in `swapped` -> why some of its calls stay as they were."""

    def __str__(self) -> str:
        kinds = [f"{n} x {kind}" for kind, n in Counter(self.swapped.values()).items()]
        parts = [f"swapped {', '.join(kinds) or 'nothing'}"]
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name, why in self.left.items() if why == reason]
            parts.append(f"left {len(names)} ({names[0]}{', …' if names[1:] else ''}): {reason}")
        parts += [
            f"{kind} keeps calls with {why}" for kind, whys in self.kept.items() for why in sorted(whys)
        ]
        return "; ".join(parts)
