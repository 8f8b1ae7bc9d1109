"""A TOML document made ready for strict validation: presets expanded, "none" read, unknown names taken out.

What is wrong with names is collected, not raised, so that one message can list everything.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dtrain.config.schema import accepts_none, child, choices, hints, leaves, nearest, table_type
from dtrain.config.toml import emit_value


class TableReader:
    """Prepares one document.

    Args:
        document: the dataclass that the whole document stands for.

    `problems` holds one line for each name that nobody reads and each preset that does not exist.
    """

    def __init__(self, document: type) -> None:
        self.document = document
        self.problems: list[str] = []

    def read(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """The table with known names only; a `preset` is replaced by its values under the table's own."""
        return self._table(self.document, table, "")

    def _value(self, hint: Any, value: Any, path: str) -> Any:
        cls = table_type(hint)
        if cls is not None and isinstance(value, dict):
            return self._table(cls, value, path)
        if value == "none" and accepts_none(hint) and "none" not in choices(hint):
            return None
        if isinstance(value, dict):
            return {k: self._value(child(hint, k), v, f"{path}.{k}") for k, v in value.items()}
        if isinstance(value, list):
            return [self._value(child(hint, i), v, f"{path}[{i}]") for i, v in enumerate(value)]
        return value

    def _table(self, cls: type, table: Mapping[str, Any], path: str) -> dict[str, Any]:
        known = hints(cls)
        base: dict[str, Any] = {}
        if "preset" in table and "preset" not in known and hasattr(cls, "presets"):
            base = self._preset(cls.presets(), table["preset"], path)
            table = {name: value for name, value in table.items() if name != "preset"}
        prepared = {}
        for name, value in table.items():
            at = f"{path}.{name}" if path else name
            if name in known:
                prepared[name] = self._value(known[name], value, at)
            else:
                self.problems.append(self._unknown(cls, name, value, at))
        return _merge(base, prepared)

    def _preset(self, presets: Mapping[str, Any], name: Any, path: str) -> dict[str, Any]:
        if isinstance(name, str) and name in presets:
            plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(presets[name]), default=str))
            return plain
        hint = did_you_mean(nearest(str(name), list(presets)))
        self.problems.append(
            f"{path}.preset = {emit_value(name)}: no such preset{hint} (there are {', '.join(presets)})"
        )
        return {}

    def _unknown(self, cls: type, name: str, value: Any, at: str) -> str:
        """One line on a name that is no field: the nearest one here, else a field of that name elsewhere."""
        near = nearest(name, list(hints(cls)))
        elsewhere = [leaf.path for leaf in leaves(self.document) if leaf.path.split(".")[-1] == name]
        if near:
            hint = did_you_mean(at.removesuffix(name) + near)
        else:
            hint = did_you_mean(elsewhere[0]) if elsewhere else f" (there are {', '.join(hints(cls))})"
        is_table = isinstance(value, dict)
        return (f"[{at}]: no such table" if is_table else f"{at} = {emit_value(value)}: no such field") + hint


def did_you_mean(name: str | None) -> str:
    """The end of a message that proposes `name`; empty when there is nothing to propose."""
    return f"; did you mean {name}?" if name else ""


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        merged[name] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
