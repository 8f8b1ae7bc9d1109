"""Config dataclasses as people see them: paths, types in words, defaults, and the nearest valid name.

A run's config is a tree of frozen dataclasses. Everything here reads that tree by its type hints and knows
nothing of values' validity.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

Hint = Any

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    type(None): '"none"',
}


class Field(NamedTuple):
    """One leaf of the config tree."""

    path: str
    type: str
    default: Any
    """`dataclasses.MISSING` when the field must be given."""
    help: str


def hints(cls: type) -> dict[str, Hint]:
    """Resolved type hints of a dataclass's fields, in order."""
    resolved = typing.get_type_hints(cls)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls) if f.init}


def members(hint: Hint) -> tuple[Hint, ...]:
    """The alternatives of a union; the hint itself when it is none."""
    origin: Any = get_origin(hint)
    return get_args(hint) if origin in (Union, types.UnionType) else (hint,)


def table_type(hint: Hint) -> type | None:
    """The dataclass that a table may stand for, also inside a union such as `Data | None`."""
    return next((m for m in members(hint) if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def accepts_none(hint: Hint) -> bool:
    """Whether the string "none" stands for None: TOML has no null of its own."""
    return type(None) in members(hint)


def child(hint: Hint, key: str | int) -> Hint | None:
    """The hint of a field, list item or dictionary value below `hint`; None when there is no such place."""
    for member in members(hint):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            found = hints(member).get(str(key))
        else:
            found = _item(get_origin(member), get_args(member), key)
        if found is not None:
            return found
    return None


def _item(origin: Any, arguments: tuple[Hint, ...], key: str | int) -> Hint | None:
    if origin is tuple and isinstance(key, int):
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        return arguments[0] if variadic else arguments[key] if key < len(arguments) else None
    if origin in (list, Sequence) and isinstance(key, int):
        return arguments[0]
    if origin in (dict, Mapping) and isinstance(key, str):
        return arguments[1]
    return None


def words(hint: Hint) -> str:
    """A type in words: "an integer", 'one of "a", "b"', "[a number, a number]"."""
    origin: Any = get_origin(hint)
    arguments = get_args(hint)
    if len(members(hint)) > 1:
        return " or ".join(words(member) for member in members(hint))
    if origin is Literal:
        return "one of " + ", ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return "[" + ", ".join(words(a) for a in arguments) + "]"
    if origin in (tuple, list, Sequence):
        return f"a list, each item {words(arguments[0])}"
    if origin in (dict, Mapping):
        return f"a table, each value {words(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "a table"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def choices(hint: Hint) -> list[str]:
    """The strings that a Literal, alone or in a union, allows."""
    literal: Any = Literal
    allowed = [a for member in members(hint) if get_origin(member) is literal for a in get_args(member)]
    return [a for a in allowed if isinstance(a, str)]


def nearest(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate that `name` was most likely meant to be, if any is close."""
    found = difflib.get_close_matches(name.lower(), candidates, n=1, cutoff=0.6)
    return found[0] if found else None


def leaves(cls: type, prefix: str = "") -> Iterator[Field]:
    """All fields below a dataclass, depth first; those of a list's items as `list[].field`."""
    if prefix and hasattr(cls, "presets"):
        names = " ".join(cls.presets())
        yield Field(
            f"{prefix}preset", f"one of {names}", None, "Values to start from; other fields override."
        )
    for f in dataclasses.fields(cls):
        hint = hints(cls).get(f.name)
        path = prefix + f.name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{path}.")
        elif hint is not None:
            yield Field(path, words(hint), default_of(f), f.metadata.get("help", ""))
            item = table_type(child(hint, 0))
            yield from leaves(item, f"{path}[].") if item else ()


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """A field's default value; `dataclasses.MISSING` when it must be given."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default
