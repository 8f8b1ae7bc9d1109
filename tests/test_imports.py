"""Imports run one way: kernels <- dtrain <- uvit, kernels <- uvit; nothing imports benchmarks or tests."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import ROOT

KERNEL_IMPORTS = {"torch", "triton"}
MAY_NOT_IMPORT = {
    "kernels": {"uvit", "benchmarks", "tests"},
    "dtrain": {"uvit", "benchmarks", "tests"},
    "uvit": {"benchmarks", "tests"},
}


def imports(path: Path) -> Iterator[str]:
    """Full dotted names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    files = [p for p in (ROOT / package).rglob("*.py") if not (package == "dtrain" and "kernels" in p.parts)]
    assert files
    for path in files:
        forbidden = {name for name in imports(path) if name.split(".")[0] in MAY_NOT_IMPORT[package]}
        assert not forbidden, f"{path} imports {forbidden}"


def test_kernels_import_torch_and_triton_only() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in KERNEL_IMPORTS | set(sys.stdlib_module_names) or name.startswith(
                "dtrain.kernels"
            ), f"{path} imports {name}"


def test_importing_a_kernel_does_not_import_the_framework() -> None:
    from tests.launch import run_python

    code = "import sys, dtrain.kernels.reference; print(*sorted(sys.modules))"
    ours = [name for name in run_python("-c", code).stdout.split() if name.split(".")[0] == "dtrain"]
    assert ours == ["dtrain", "dtrain.kernels", "dtrain.kernels.reference"]
