"""Kernels are compiled for GPUs that are not there, and each way to fail is told from being fine.

The kernels below are compiled by a process of their own, as the command line does it: this one may be running
Triton's interpreter, in which nothing is compiled.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.kernels import aot
from dtrain.kernels.launch import HAS_TRITON, SHARED_BYTES, AotCase, tl, triton
from dtrain.kernels.tiles import TILES
from tests.launch import run_python

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, whose wheels are for Linux")


@triton.jit
def _product_kernel(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out = a·bᵀ for one block of out: a (M, K), b (N, K), out (M, N) in fp32, all contiguous."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    b_out = tl.zeros([M, N], dtype=tl.float32)
    for i_k in range(0, K, BLOCK_K):
        b_a = tl.load(a + o_m[:, None] * K + i_k + o_k)
        b_b = tl.load(b + o_n[:, None] * K + i_k + o_k)
        b_out = tl.dot(b_a, tl.trans(b_b), b_out)
    tl.store(out + o_m[:, None] * N + o_n, b_out)


@triton.jit
def _double_kernel(x, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + o_x, tl.load(x + o_x) * 2)


FINE = AotCase(
    name="fine",
    kernel=_product_kernel,
    arch="sm_80",
    signature={"a": "*fp16", "b": "*fp16", "out": "*fp32", "K": "i32"},
    constexprs={"M": 64, "N": 64, "BLOCK_K": 64},
    divisible=("a", "b", "out", "K"),
    options={"num_warps": 4, "num_stages": 2},
)
DOUBLE = AotCase(
    name="no product, not said",
    kernel=_double_kernel,
    arch="sm_90",
    signature={"x": "*fp32"},
    constexprs={"BLOCK": 1024},
    divisible=("x",),
    options={"num_warps": 4},
)


def aot_cases() -> Iterator[AotCase]:
    """One case that is fine, for every architecture, and for sm_90 one for each way to fail."""

    def case(name: str, m: int, n: int, num_warps: int, num_stages: int, **changes: Any) -> AotCase:
        sizes = {"M": m, "N": n, "BLOCK_K": 64}
        options = {"num_warps": num_warps, "num_stages": num_stages}
        return dataclasses.replace(
            FINE, name=name, arch="sm_90", constexprs=sizes, options=options, **changes
        )

    yield from (dataclasses.replace(FINE, arch=arch) for arch in SHARED_BYTES)
    yield case("spills", 128, 256, num_warps=4, num_stages=2)
    yield case("spills with leave", 128, 256, num_warps=4, num_stages=2, max_spills=100_000)
    yield case("too much shared memory", 128, 256, num_warps=8, num_stages=6)
    yield case("rows too few for wgmma", 16, 64, num_warps=4, num_stages=2)
    yield case("nothing divisible", 64, 64, num_warps=4, num_stages=2, divisible=())
    yield case("not a power of two", 48, 64, num_warps=4, num_stages=2)
    yield dataclasses.replace(DOUBLE, name="no product, said", tensor_cores=False)
    yield DOUBLE


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command line; returns its exit status, what it printed and its measurements by (arch, name)."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def run(*arguments: str) -> tuple[int, str, dict[tuple[str, str], aot.Measurement]]:
        report = tmp_path / "report.json"
        done = run_python(
            "-m", "dtrain.kernels.aot", *arguments, "--json", report, check=False, timeout_s=900
        )
        assert report.exists(), done.stderr
        document = json.loads(report.read_text())
        assert document["triton"] == triton.__version__
        assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", document["commit"])
        measured = [aot.Measurement(**m | {"problems": tuple(m["problems"])}) for m in document["cases"]]
        return done.returncode, done.stdout, {(m.arch, m.name): m for m in measured}

    return run


def test_fine_kernels_pass_and_each_failure_is_told(compiler: Any) -> None:
    status, printed, measured = compiler("tests.kernels.test_aot")
    assert list(measured) == [(case.arch, case.name) for case in aot_cases()]
    for fine in (measured[arch, "fine"] for arch in SHARED_BYTES):
        assert (fine.spills, fine.problems) == (0, ())
        assert min(fine.registers, fine.shared_bytes, fine.tensor_cores, fine.wide_loads) > 0
    hopper = {name: m for (arch, name), m in measured.items() if arch == "sm_90"}
    spills, shared = hopper["spills"].spills, hopper["too much shared memory"].shared_bytes
    assert hopper["spills with leave"].spills == spills > 0
    assert hopper["nothing divisible"].wide_loads == 0
    problems = {name: m.problems for name, m in hopper.items() if m.problems}
    (reason,) = problems.pop("not a power of two")
    assert reason.startswith("does not compile: ")
    assert "must be a power of 2" in reason
    assert problems == {
        "spills": (f"{spills} spill stores, the tile allows 0",),
        "too much shared memory": (f"{shared:,} bytes of shared memory, the limit is 232,448",),
        "rows too few for wgmma": ("no tensor-core instruction of sm_90",),
        "no product, not said": ("no tensor-core instruction of sm_90",),
    }
    assert all(f"fails: {problem}" in printed for (problem,) in problems.values())
    assert f"{len(measured)} cases, triton {triton.__version__}: 5 failing" in printed
    assert status == 1


def test_an_architecture_can_be_chosen(compiler: Any) -> None:
    status, _, measured = compiler("tests.kernels.test_aot", "--arch", "sm_80", "gfx942")
    assert (status, list(measured)) == (0, [("sm_80", "fine"), ("gfx942", "fine")])


def test_nothing_to_compile_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = run_python("-m", "dtrain.kernels.aot", "dtrain.kernels.reference", "--arch", "sm_90", check=False)
    assert (done.returncode, done.stderr) == (1, "no module offers a kernel for sm_90\n")


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = run_python("-m", "dtrain.kernels.aot", check=False)
    assert (done.returncode, done.stderr) == (1, "TRITON_INTERPRET is set: unset it to compile\n")


def test_every_shipped_tile_is_compiled() -> None:
    cases = list(aot.cases())
    assert len(cases) == len({(case.arch, case.name) for case in cases})
    attention = [case for case in cases if "BLOCK_M" in case.constexprs]
    compiled = {(c.arch, c.name.split()[0], *_blocks(c), c.options["num_warps"]) for c in attention}
    for op, passes in TILES.items():
        for pass_name, archs in passes.items():
            for arch, rows in archs.items():
                wanted = {
                    (arch, f"{op}.{pass_name}", t.block_m, t.block_n, t.num_warps) for t in rows.values()
                }
                assert wanted <= compiled, f"{op} {pass_name} on {arch}"


def _blocks(case: AotCase) -> tuple[int, int]:
    return case.constexprs["BLOCK_M"], case.constexprs["BLOCK_N"]


def _is_narrow(name: str) -> bool:
    """A thread of AdamW holds four numbers of each tensor: 16 bytes in fp32, less in other dtypes."""
    return name.startswith("adamw") and ("unaligned" in name or "bf16 8-bit" in name)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_passes(arch: str, compiler: Any) -> None:
    status, printed, found = compiler("tests.kernels.shipped", "--arch", arch)
    assert status == 0, printed
    assert {m.arch for m in found.values()} == {arch}
    measured = {name: m for (_, name), m in found.items()}
    assert [name for name, m in measured.items() if not m.wide_loads and not _is_narrow(name)] == []
    if arch == "sm_90":
        assert {m.spills for m in measured.values()} == {0}
        check_gelu_loads_rows_by_16_bytes(measured)
        check_norms_copy_rows_ahead_by_16_bytes(measured)
        check_rotations_load_by_16_bytes_where_halves_of_heads_allow_it(measured)
        check_quantisers_load_by_16_bytes(measured)


def check_gelu_loads_rows_by_16_bytes(measured: dict[str, aot.Measurement]) -> None:
    cases = [m for name, m in measured.items() if name.startswith("gelu")]
    assert len(cases) == 6
    for case in cases:
        assert case.wide_loads == 2, case  # two vectors forwards, pre and dact backwards
        assert case.registers <= 64, case


def check_norms_copy_rows_ahead_by_16_bytes(measured: dict[str, aot.Measurement]) -> None:
    for width in (768, 1024, 1152, 1536, 2048, 3072):
        for way, tensors in (("forward", 2), ("backward", 3)):
            case = measured[f"norm.{way} add_norm D={width}"]
            assert case.wide_loads >= 3 * tensors, case  # the first two rows of a program and one in its loop
            assert case.shared_bytes >= 2 * tensors * width * 2, case  # two rows


def check_rotations_load_by_16_bytes_where_halves_of_heads_allow_it(
    measured: dict[str, aot.Measurement],
) -> None:
    """Halves of rows, 4 loads of angles, 4 of weights."""
    rows = {"forward": 6, "backward": 10}
    for (name, halves), values in itertools.product(rows.items(), (True, False)):
        suffix = "" if values else " without values"
        found = {d: measured[f"qk_norm_rope.{name} D={d}{suffix}"].wide_loads for d in (64, 72, 96, 128)}
        loads = halves - (0 if values else 2) + 4 + 4
        assert found == {64: loads, 72: 2, 96: loads, 128: loads}  # of D = 72 the angles alone


def check_quantisers_load_by_16_bytes(measured: dict[str, aot.Measurement]) -> None:
    for bits, codes in (("int8", 2), ("fp8", 2), ("int4", 1)):
        # A thread's 16 elements of each half: of fp32 in 4 loads, of codes in one, or both halves in one.
        loads = {"encode": 2 * 4, "decode_sum": codes, "decode_sum_encode": codes}
        found = {name: measured[f"quantize.{name} {bits} block=128 rotation=0"].wide_loads for name in loads}
        assert found == loads, bits
