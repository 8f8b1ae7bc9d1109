"""One definition of the format: our reader, the schema file and an independent validator agree on it."""

import copy
import json
from dataclasses import asdict, fields

import pytest
from pydantic import TypeAdapter, ValidationError, with_config

from benchmarks.__main__ import SCHEMA
from benchmarks.result import RESULTS, Result, read
from benchmarks.schema import decode, json_schema

STRICT = TypeAdapter(with_config({"strict": True, "extra": "forbid", "allow_inf_nan": False})(Result))

FAULTS = [
    (("case",), 7, r"\$\.case = 7: expected str"),
    (("threads",), "2", r"\$\.threads = '2': expected int"),
    (("threads",), True, r"\$\.threads = True: expected int"),
    (("dirty",), 1, r"\$\.dirty = 1: expected bool"),
    (("floor", "floor_ms"), float("inf"), r"\$\.floor\.floor_ms = inf: expected float"),
    (("floor", "floor_ms"), None, r"\$\.floor\.floor_ms = None: expected float"),
    (("device", "kind"), "tpu", r"\$\.device\.kind = 'tpu': expected .*'cuda'"),
    (("gates", 0, "passed"), None, r"\$\.gates\[0\]\.passed = None: expected bool"),
    (("gates",), {}, r"\$\.gates = \{\}: expected tuple"),
    (
        ("contestants", "ours", "step_ms", "samples", 1),
        "fast",
        r"\$\.contestants\.ours\.step_ms\.samples\[1\] = 'fast'",
    ),
    (("contestants", "ours"), [], r"\$\.contestants\.ours = \[\]: expected"),
    (("versions", "torch"), 2.13, r"\$\.versions\.torch = 2\.13: expected str"),
    (("device",), "A CPU", r"\$\.device = 'A CPU': expected an object \(Device\)"),
    (("floor", "surplus"), 1, r"\$\.floor\.surplus: not a field of Floor"),
]


@pytest.fixture
def document(result):
    return json.loads(json.dumps(asdict(result)))


def test_a_result_is_read_back_equal(result, document):
    assert decode(Result, document) == result
    assert STRICT.validate_json(json.dumps(document)) == result


@pytest.mark.parametrize(("path", "value", "message"), FAULTS)
def test_a_fault_is_named_by_path_and_refused_by_both(document, path, value, message):
    broken = copy.deepcopy(document)
    parent = broken
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        decode(Result, broken)
    with pytest.raises(ValidationError):
        STRICT.validate_json(json.dumps(broken))


def test_each_field_is_required(document):
    for key in document:
        with pytest.raises(ValueError, match=rf"\$\.{key}: missing"):
            decode(Result, {k: v for k, v in document.items() if k != key})


def test_an_integer_is_a_float_too(document):
    document["floor"]["floor_ms"] = 500
    assert type(decode(Result, document).floor.floor_ms) is float


@pytest.mark.parametrize(("text", "message"), [("[]", "schema_version = None"), ("{", "Expecting")])
def test_a_file_that_is_no_result_is_named(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json: .*{message}"):
        read(tmp_path / "x.json")


def test_another_version_is_refused(tmp_path, document):
    (tmp_path / "x.json").write_text(json.dumps(document | {"schema_version": 2}))
    with pytest.raises(ValueError, match=r"schema_version = 2: this reader knows 1"):
        read(tmp_path / "x.json")


def test_schema_file_is_the_one_that_the_dataclasses_give():
    assert json.loads(SCHEMA.read_text()) == json_schema(Result)


def test_every_field_of_the_format_is_described():
    def objects(node):
        if isinstance(node, dict):
            yield from ([node] if "properties" in node else [])
            for child in node.values():
                yield from objects(child)

    found = [p for o in objects(json_schema(Result)) for p in o["properties"].values()]
    assert len(found) > len(fields(Result))
    assert [p for p in found if "description" not in p] == []


def test_recorded_results_are_valid():
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for file in files:
        assert STRICT.validate_json(file.read_text()) == read(file)
