"""What must hold of any config, any manifest and any stream of samples, whatever hypothesis comes up with."""

import json
import tomllib
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain.checkpoint import Damaged, Progress, damage, read_progress
from dtrain.checkpoint.folder import MANIFEST, SUMS, write_manifest
from dtrain.checkpoint.storage import TENSORS, Reader, digest_of
from dtrain.config import ConfigError, from_table, load, to_toml
from dtrain.data import index_at, leave_out, micro_batch_indices
from dtrain.recipe import DataState

RECIPE = {"recipe": "tests.dtrain.tiny_dit:recipe", "name": "run"}
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

numbers = st.integers(0, 2**40)
# What TOML can hold.
plain = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
# Names that exist, with values that do not fit, are what a parser stumbles over.
names = st.sampled_from(["train", "optim", "mesh", "faults", "checkpoint", "model", "seed", "name", "recipe"])
fields = st.sampled_from(["steps", "lr", "shard", "every", "hang_s", "width", "betas", "resume"])
tables = st.dictionaries(
    names | st.text(max_size=6), plain | st.dictionaries(fields, plain, max_size=3), max_size=3
)


@given(table=tables)
@settings(deadline=None)
def test_a_table_is_a_config_or_a_config_error(table: dict) -> None:
    try:
        config = from_table({**RECIPE, **table})
    except ConfigError:
        pass
    else:
        assert from_table(tomllib.loads(to_toml(config))) == config


@given(text=st.text(max_size=60) | st.binary(max_size=60))
@SAME_FOLDER
def test_a_file_is_a_config_or_a_config_error(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load(path)


@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-12, 10, allow_nan=False),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
)
@settings(deadline=None)
def test_what_is_written_loads_back_equal(
    steps: int, lr: float, name: str, betas: tuple[float, float]
) -> None:
    table = {"train": {"steps": steps}, "optim": {"lr": lr, "betas": list(betas)}, "name": name}
    config = from_table({**RECIPE, **table})
    assert from_table(tomllib.loads(to_toml(config))) == config


ranges = st.lists(st.tuples(numbers, st.integers(0, 50)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)


@given(
    progress=st.builds(
        Progress,
        step=numbers,
        sample=numbers,
        seed=numbers,
        world=numbers,
        fingerprint=st.text(),
        left_out=ranges.map(tuple),
        losses=st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
    ),
    config=st.text(st.characters(codec="utf-8")),
)
@SAME_FOLDER
def test_a_manifest_gives_back_what_it_was_given(progress: Progress, config: str, tmp_path: Path) -> None:
    (tmp_path / TENSORS).write_text("{}")
    write_manifest(tmp_path, progress, config, {TENSORS: digest_of(tmp_path / TENSORS)})
    assert read_progress(tmp_path) == progress
    assert json.loads((tmp_path / MANIFEST).read_text())["config"] == config
    assert list(damage(tmp_path)) == []


@given(manifest=st.binary(max_size=80) | plain.map(lambda value: json.dumps(value).encode()))
@SAME_FOLDER
def test_no_manifest_is_read_by_halves(manifest: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(manifest)
    with pytest.raises(Damaged, match=MANIFEST):
        read_progress(tmp_path)


@given(content=st.binary(max_size=80) | plain.map(lambda value: json.dumps(value).encode()))
@SAME_FOLDER
def test_no_list_of_tensors_is_read_by_halves(content: bytes, tmp_path: Path) -> None:
    (tmp_path / TENSORS).write_bytes(content)
    try:
        found = Reader(tmp_path).tensors()
    except ValueError as error:
        assert TENSORS in str(error)  # noqa: PT017
    else:
        assert found == {}
        assert json.loads(content) == {}


@given(sums=st.binary(max_size=200))
@SAME_FOLDER
def test_no_list_of_hashes_is_taken_for_another(sums: bytes, tmp_path: Path) -> None:
    (tmp_path / SUMS).write_bytes(sums)
    assert list(damage(tmp_path))


@given(
    bad=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=5),
    world=st.integers(1, 4),
    micro_batch=st.integers(1, 3),
    start=st.integers(0, 40),
)
def test_a_stream_is_all_indices_but_those_left_out(
    bad: list[tuple[int, int]], world: int, micro_batch: int, start: int
) -> None:
    left_out: tuple[tuple[int, int], ...] = ()
    out: set[int] = set()
    for first, more in bad:
        left_out = leave_out(left_out, first, first + more)
        out |= set(range(first, first + more + 1))
    assert all(a[1] < b[0] for a, b in pairwise(left_out))
    kept = [index for index in range(400) if index not in out]
    assert [index_at(place, left_out) for place in range(200)] == kept[:200]
    state = DataState(0, start, micro_batch, left_out=left_out)
    streams = [islice(micro_batch_indices(rank, world, state), 5) for rank in range(world)]
    read = [index for step in zip(*streams, strict=True) for batch in step for index in batch]
    assert read == kept[start : start + len(read)]
