"""C++ sources are compiled once, also where processes start together, and it is said where they cannot be."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtrain.kernels import compiled, quantize, quantize_cpu
from dtrain.kernels.payload import Format

SOURCE = "quantize_cpu.cpp"
needs_compiler = pytest.mark.skipif(compiled._compiler() is None, reason="there is no compiler")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caches = compiled.load, quantize_cpu._functions, quantize._compiled
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


ENCODE = """
import sys, torch
from dtrain.kernels.quantize import Format, encode, _server
x = torch.arange(-500.0, 500.0)
assert _server("auto", x.device) == "compiled"
assert encode(x, Format("int8")).equal(encode(x, Format("int8"), backend="reference"))
"""


@needs_compiler
def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    """In a folder without an installed package, as in a clone."""
    slow = script(
        tmp_path / "cxx",
        f'case "$*" in *-shared*) echo compiled >> {tmp_path}/log; sleep 1;; esac',
        f'exec {compiled._compiler()} "$@"',
    )
    root = Path(compiled.__file__).resolve().parents[1]
    environment = os.environ | {
        "CXX": str(slow), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(root)
    }  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, "-c", ENCODE], env=environment, cwd=tmp_path) for _ in range(4)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["compiled"]
    kept = sorted(path.suffix for path in (tmp_path / "cache" / "dtrain").iterdir())
    assert kept == [".lock", ".so"]


def test_without_a_compiler_pytorch_serves_and_it_is_said_once(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    x, format = torch.randn(300), Format("int4", 128, 32)
    with caplog.at_level(logging.WARNING):
        found = [quantize.encode(x, format) for _ in range(2)]
    assert found[0].equal(quantize.encode(x, format, backend="reference"))
    assert [r.getMessage() for r in caplog.records] == [
        "quantisation takes several passes: there is no g++ on PATH, and CXX names no compiler"
    ]


def test_what_the_compiler_says_is_passed_on(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = script(anew / "cxx", "echo unknown option >&2", "exit 1")
    monkeypatch.setenv("CXX", str(broken))
    assert compiled.load(SOURCE) == f"{broken} does not compile {SOURCE}: unknown option"


def test_a_cache_that_cannot_be_written(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (anew / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(anew / "file"))
    assert f"{SOURCE} cannot be compiled and kept" in str(compiled.load(SOURCE))


@needs_compiler
def test_a_compilation_that_failed_is_tried_again(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was cut off half-way is not found under the library's name."""
    compiler = compiled._compiler()
    half = script(
        anew / "cxx",
        f'case "$*" in *-shared*) ;; *) exec {compiler} "$@";; esac',
        'for last; do :; done; echo half > "$last"; kill -9 $$',
    )
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(half))
        assert isinstance(compiled.load(SOURCE), str)
    assert not list((anew / "cache" / "dtrain").glob("*.so"))
    compiled.load.cache_clear()
    assert not isinstance(compiled.load(SOURCE), str)


@needs_compiler
def test_other_sources_and_flags_are_other_libraries(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = anew / "quantize_cpu.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    compiler = compiled._compiler()
    paths = [compiled._library(source, compiler)]
    paths.append(compiled._library(source, compiler))
    source.write_text('extern "C" int one() { return 2; }\n')
    paths.append(compiled._library(source, compiler))
    monkeypatch.setattr(compiled, "_FLAGS", (*compiled._FLAGS, "-g0"))
    paths.append(compiled._library(source, compiler))
    assert paths[0] == paths[1]
    assert len(set(paths)) == 3
