"""Launch parameters: a tile for each GPU and head dim, a file laid over the table, and no Triton at all."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.kernels import launch
from dtrain.kernels.launch import SHARED_BYTES, known_arch
from dtrain.kernels.tiles import TILES, Tile, tiles
from tests.launch import run_python

ROW = {"block_m": 32, "block_n": 16, "num_warps": 2, "num_stages": 1}


@pytest.fixture
def override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a document to a file and name it in DTRAIN_TILES."""

    def use(document: Any) -> None:
        path = tmp_path / "tiles.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        monkeypatch.setenv("DTRAIN_TILES", str(path))

    return use


def test_every_pass_has_a_tile_for_every_architecture_and_head_dim() -> None:
    for op, passes in TILES.items():
        for pass_name, archs in passes.items():
            assert archs.keys() == SHARED_BYTES.keys(), f"{op} {pass_name}"
            for arch, rows in archs.items():
                assert max(rows) == 128
                for head_dim in range(32, 129, 8):
                    reach = min(r for r in rows if r >= head_dim)
                    assert tiles(op, pass_name, arch, head_dim) is rows[reach]


def test_a_head_dim_beyond_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head_dim = 136: attention forward on sm_90 serves at most 128"):
        tiles("attention", "forward", "sm_90", 136)


@pytest.mark.parametrize(
    ("arch", "nearest"),
    [("sm_87", "sm_86"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("gfx950", "gfx942")],
)
def test_an_unknown_gpu_uses_the_nearest_older_one_and_says_so_once(
    arch: str, nearest: str, caplog: pytest.LogCaptureFixture
) -> None:
    known_arch.cache_clear()
    with caplog.at_level(logging.WARNING):
        served = [tiles("attention", "forward", arch, head_dim) for head_dim in (64, 128)]
        assert known_arch(arch) == nearest
    assert served == [tiles("attention", "forward", nearest, head_dim) for head_dim in (64, 128)]
    assert [r.getMessage() for r in caplog.records] == [
        f"{arch} has no launch parameters of its own: its kernels use those of {nearest}"
    ]


def test_a_known_gpu_is_itself_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    known_arch.cache_clear()
    assert [known_arch(arch) for arch in SHARED_BYTES] == list(SHARED_BYTES)
    assert not caplog.records


@pytest.mark.parametrize("arch", ["sm_75", "gfx90a"])
def test_a_gpu_older_than_all_is_refused(arch: str) -> None:
    with pytest.raises(ValueError, match=f"arch = {arch}: no kernel is made for it; known are sm_80"):
        tiles("attention", "forward", arch, 64)


def test_rows_of_the_file_come_first_for_their_architecture_only(override: Any) -> None:
    others = [(arch, d) for arch in SHARED_BYTES for d in (64, 128) if (arch, d) != ("sm_90", 64)]
    shipped = [tiles("attention", "forward", *other) for other in others]
    override({"attention": {"forward": {"sm_90": {"64": ROW}}}})
    assert tiles("attention", "forward", "sm_90", 64) == Tile(**ROW)
    assert tiles("attention", "forward", "sm_90", 32) == Tile(**ROW)
    assert [tiles("attention", "forward", *other) for other in others] == shipped


def test_the_file_may_split_a_row_and_name_an_unknown_gpu(override: Any) -> None:
    others = [("sm_90", 80), ("sm_90", 128), ("sm_100", 64), ("sm_103", 128)]
    shipped = [tiles("attention", "forward", *other) for other in others]
    override({"attention": {"forward": {"sm_90": {"72": ROW}, "sm_103": {"64": ROW}}}})
    assert tiles("attention", "forward", "sm_90", 72) == Tile(**ROW)
    assert tiles("attention", "forward", "sm_103", 64) == Tile(**ROW)
    assert [tiles("attention", "forward", *other) for other in others] == shipped


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("{", "Expecting property name"),
        ([], "no attribute 'items'"),
        ({"attention": {"sideways": {"sm_90": {"64": ROW}}}}, "attention.sideways: no such pass"),
        ({"fusion": {"forward": {"sm_90": {"64": ROW}}}}, "fusion.forward: no such pass"),
        ({"attention": {"forward": {"sm_90": {"64": ROW | {"block_k": 8}}}}}, "'block_k'"),
        ({"attention": {"forward": {"sm_90": {"wide": ROW}}}}, "'wide'"),
        ({"attention": {"forward": {"sm_90": {"64": ROW | {"block_n": 48}}}}}, "block_n = 48: must be"),
    ],
)
def test_a_wrong_file_is_named(override: Any, document: Any, reason: str) -> None:
    override(document)
    with pytest.raises(ValueError, match=rf"DTRAIN_TILES = .*tiles\.json: .*{reason}"):
        tiles("attention", "forward", "sm_90", 64)


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_TILES", "nowhere.json")
    with pytest.raises(ValueError, match=r"DTRAIN_TILES = nowhere\.json: .*No such file"):
        tiles("attention", "forward", "sm_90", 64)


@pytest.mark.parametrize(
    "wrong", [{"block_m": 0}, {"num_warps": 3}, {"num_stages": 0}, {"max_spills": -1}, {"block_m": 64.0}]
)
def test_a_tile_checks_its_fields(wrong: dict[str, Any]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"^{name} = {value!r}: must be"):
        Tile(**(ROW | wrong))


def test_kernels_run_on_the_cpu_only_in_the_interpreter() -> None:
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    assert launch.can_launch(torch.device("cpu")) == interpreting
    assert launch.arch_of(torch.device("cpu")) in SHARED_BYTES


def test_every_kernel_file_imports_without_triton() -> None:
    code = """
import sys, pkgutil, importlib, torch
sys.modules["triton"] = None
import dtrain.kernels
names = [m.name for m in pkgutil.iter_modules(dtrain.kernels.__path__)]
modules = [importlib.import_module("dtrain.kernels." + name) for name in names]

from dtrain.kernels.launch import HAS_TRITON, can_launch, tl, triton

@triton.jit
def plain(x, BLOCK: tl.constexpr): return x + BLOCK

@triton.jit(do_not_specialize=["x"])
def configured(x, BLOCK: tl.constexpr = tl.constexpr(2)): return x + BLOCK

assert (plain(1, 1), configured(1)) == (2, 3)
assert not HAS_TRITON and not can_launch(torch.device("cpu")) and not can_launch(torch.device("cuda"))
print(*names)
"""
    names = run_python("-c", code).stdout.split()
    assert {"launch", "reference", "aot"} <= set(names)


@pytest.mark.gpu
def test_this_gpu_is_known_and_has_the_shared_memory_of_the_table() -> None:
    arch = launch.arch_of(torch.device("cuda", 0))
    properties = torch.cuda.get_device_properties(0)
    assert properties.shared_memory_per_block_optin >= SHARED_BYTES[known_arch(arch)]
