"""Config dataclasses as TOML text, and single values out of it (https://toml.io/en/v1.0.0).

TOML has no null: a field that is None is left out where None is its default, and is "none" elsewhere.
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtrain.config.schema import default_of

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def parse_value(text: str) -> Any:
    """Read a TOML value; text that is none (a word, a path) is taken as a string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def emit_value(value: Any) -> str:
    """Write one value; dataclasses and mappings become inline tables.

    Raises:
        ValueError: TOML cannot hold the value.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(emit_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {emit_value(v)}" for k, v in value.items()) + "}"
    if dataclasses.is_dataclass(value):
        return emit_value(dict(_entries(value)))
    raise ValueError(f"{value!r} cannot be written as TOML")


def emit_table(entries: Mapping[str, Any], path: str = "") -> str:
    """Write a table: plain values first, then each dataclass among them as a table of its own.

    Args:
        entries: values by key; None is not allowed, see `entries_of`.
        path: dotted name of the table, "" for the document itself.
    """
    plain = {k: v for k, v in entries.items() if not dataclasses.is_dataclass(v)}
    lines = [f"[{path}]\n"] if path and plain else []
    lines += [f"{_key(key)} = {emit_value(value)}\n" for key, value in plain.items()]
    text = "".join(lines)
    for key, value in entries.items():
        if dataclasses.is_dataclass(value):
            inner = emit_table(entries_of(value), f"{path}.{_key(key)}" if path else _key(key))
            text += ("\n" if text and inner else "") + inner
    return text


def entries_of(config: Any) -> dict[str, Any]:
    """A dataclass's fields by name as they stand in TOML, one level deep."""
    return dict(_entries(config))


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.init and not (value is None and default_of(f) is None):
            yield f.name, "none" if value is None else value


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else json.dumps(name)
