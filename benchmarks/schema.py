"""Read JSON into dataclasses, strictly, and write the JSON Schema of the same dataclasses.

Both walk the type hints, so a format has one definition, and no third-party validator is needed where results
are made. Known hints: str, int, float, bool, Literal, X | None, tuple[X, ...], dict[str, X], and dataclasses.
Dialect: https://json-schema.org/draft/2020-12
"""

import math
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_JSON_NAME = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def decode(hint: Any, value: Any, path: str = "$") -> Any:
    """The value as `hint` describes it.

    Raises:
        ValueError: names the path, the value and what belongs there.
    """
    if is_dataclass(hint):
        return _decode_object(hint, value, path)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return None if value is None else decode(arguments[0], value, path)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is Literal and value in arguments and type(value) in map(type, arguments):
        return value
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is hint and hint is not float:
        return value
    raise ValueError(f"{path} = {value!r}: expected {hint.__name__ if isinstance(hint, type) else hint}")


def _decode_object(cls: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{path} = {value!r}: expected an object ({cls.__name__})")
    hints = get_type_hints(cls)
    for key in sorted(hints.keys() ^ value.keys()):
        raise ValueError(f"{path}.{key}: {'missing' if key in hints else f'not a field of {cls.__name__}'}")
    return cls(**{key: decode(hint, value[key], f"{path}.{key}") for key, hint in hints.items()})


def json_schema(cls: Any) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that accepts what `decode(cls, …)` accepts."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.__name__, **_schema(cls)}


def _schema(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        properties = {f.name: {**_schema(hints[f.name]), **_description(f.metadata)} for f in fields(hint)}
        return {
            "type": "object",
            "properties": properties,
            "required": list(hints),
            "additionalProperties": False,
        }
    if origin is UnionType:
        return {"anyOf": [_schema(argument) for argument in arguments]}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    if origin is Literal:
        return {"enum": list(arguments)}
    return {"type": _JSON_NAME[hint]}


def _description(metadata: Any) -> dict[str, str]:
    return {"description": metadata["help"]} if "help" in metadata else {}
