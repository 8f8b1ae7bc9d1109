"""Compiles every kernel and shipped tile for GPUs that are not there, and reads what came out.

A tile can fit a GPU and still be wrong for it: registers spill to memory, a product runs beside the tensor
cores, a launch fails for want of shared memory. The machine code tells, and Triton's wheel brings compilers
and disassemblers for both vendors, so that no GPU is needed to ask:

    python -m dtrain.kernels.aot [MODULE ...] [--arch sm_90 ...] [--json FILE]

The exit status is 1 when a kernel does not compile, spills more than its tile allows, asks for more shared
memory than the GPU has, or multiplies matrices without the tensor-core instruction of its architecture.
"""

import argparse
import dataclasses
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import dtrain.kernels
from dtrain.kernels.launch import HAS_TRITON, SHARED_BYTES, AotCase, triton

# Tensor-core instructions: of mma.sync, wgmma, tcgen05.mma and AMD's matrix cores. GPUs that have a newer
# kind run mma.sync as well, at a fraction of their speed, so each architecture counts its own kind only.
_TENSOR_CORE = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), r"\b[HIQ]MMA\b"),
    "sm_90": r"\b[HIQ]GMMA\b",
    "sm_100": r"\bUTC\w*MMA\b",
    "gfx942": r"\bv_mfma_",
}
# Loads from global memory of 16 bytes a thread or more, to registers or shared memory, or of a tile at once.
_WIDE_LOAD = r"\bLDG(?:STS)?\.(?:\S*\.)?(?:128|256)\b|\bUTMALDG\b|\b(?:global|buffer)_load_dwordx4\b"


@dataclass(frozen=True)
class Measurement:
    """What the compiler made of one case.

    Args:
        registers: of a thread.
        spills: instructions that store a register to local memory (AMD: registers kept there).
        shared_bytes: shared memory of a block.
        tensor_cores, wide_loads: how often such instructions stand in the code, not how often they run.
        seconds: to compile it; next to none when Triton has it in its cache.
        problems: why the case fails; empty when it is fine.
    """

    name: str
    arch: str
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0
    tensor_cores: int = 0
    wide_loads: int = 0
    seconds: float = 0.0
    problems: tuple[str, ...] = ()


def measure(case: AotCase) -> Measurement:
    """Compile a case and judge it. That it does not compile is one of the problems, not an exception."""
    started = time.perf_counter()
    try:
        kernel = compile_case(case)
    except Exception as error:  # each pass of the compiler raises what it likes
        return Measurement(
            case.name, case.arch, problems=(f"does not compile: {type(error).__name__}: {error}",)
        )
    seconds = round(time.perf_counter() - started, 2)
    code = (_amd_code if case.arch.startswith("gfx") else _nvidia_code)(kernel.asm)
    measured = Measurement(
        name=case.name,
        arch=case.arch,
        registers=code.registers,
        spills=code.spills,
        shared_bytes=kernel.metadata.shared,
        tensor_cores=_count(_TENSOR_CORE[case.arch], code.text),
        wide_loads=_count(_WIDE_LOAD, code.text),
        seconds=seconds,
    )
    return dataclasses.replace(measured, problems=tuple(_problems(case, measured)))


def compile_case(case: AotCase) -> Any:
    """Triton's CompiledKernel: `asm` and `metadata` can be read anywhere, a launch needs the GPU."""
    names = case.kernel.arg_names
    source = triton.compiler.ASTSource(
        case.kernel,
        signature={n: "constexpr" if n in case.constexprs else case.signature[n] for n in names},
        constexprs=dict(case.constexprs),
        # As a launch has them, empty ones too: one that follows finds the compiled kernel in Triton's cache.
        attrs={
            (i,): [["tt.divisibility", 16]] if n in case.divisible else []
            for i, n in enumerate(names)
            if n in case.divisible or n in case.constexprs
        },
    )
    return triton.compile(source, target=_target(case.arch), options=case.options)


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _problems(case: AotCase, measured: Measurement) -> Iterator[str]:
    limit = SHARED_BYTES[case.arch]
    if measured.spills > case.max_spills:
        yield f"{measured.spills} spill stores, the tile allows {case.max_spills}"
    if measured.shared_bytes > limit:
        yield f"{measured.shared_bytes:,} bytes of shared memory, the limit is {limit:,}"
    if case.tensor_cores and not measured.tensor_cores:
        yield f"no tensor-core instruction of {case.arch}"


class _Code(NamedTuple):
    text: str
    registers: int
    spills: int


def _nvidia_code(asm: Any) -> _Code:
    """The machine code of a cubin, disassembled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        # -ndf: without an analysis of branches, a fifth of its time
        text = _output(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    return _Code(text, registers=_number(r"\bREG:(\d+)", usage), spills=_count(r"\bSTL\b", text))


def _amd_code(asm: Any) -> _Code:
    """AMD's assembly, with the counts in the metadata at its end."""
    text = asm["amdgcn"]
    return _Code(text, *(_number(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")))


def _output(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"the disassembly has no {pattern}"
    return int(found[1])


def cases(modules: Iterable[str] = ()) -> Iterator[AotCase]:
    """What modules offer through a function `aot_cases()`; by default all of this package, none forgotten."""
    package = dtrain.kernels
    every = (f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__))
    for name in modules or every:
        yield from getattr(importlib.import_module(name), "aot_cases", tuple)()


_WIDTHS = {
    "arch": 7, "registers": 9, "spills": 6, "shared_bytes": 12, "tensor_cores": 12, "wide_loads": 10,
    "seconds": 7, "name": 0,
}  # fmt: skip


def _line(values: Iterable[object]) -> str:
    return "  ".join(f"{value!s:>{width}}" for value, width in zip(values, _WIDTHS.values(), strict=True))


def _measure_all(chosen: Iterable[AotCase]) -> Iterator[Measurement]:
    """Measure and print as it goes: a line a case, and one for each of its problems."""
    print(_line(_WIDTHS))
    for case in chosen:
        measured = measure(case)
        print(_line(getattr(measured, column) for column in _WIDTHS))
        for problem in measured.problems:
            print(f"    fails: {problem}")
        yield measured


def _commit() -> str:
    """Of the checkout that this file is in, "-dirty" where it differs; empty where there is none."""
    describe = ("git", "describe", "--always", "--abbrev=40", "--dirty")
    try:
        return _output(*describe, cwd=Path(__file__).resolve().parent).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dtrain.kernels.aot",
        description="Compile kernels for GPUs that are not there, and report what the machine code holds.",
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="modules with aot_cases(); default: all")
    parser.add_argument("--arch", nargs="+", choices=SHARED_BYTES, default=list(SHARED_BYTES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _arguments(argv)
    if not HAS_TRITON or triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: unset it to compile" if HAS_TRITON else "triton is not installed")
    measured = list(_measure_all(case for case in cases(arguments.modules) if case.arch in arguments.arch))
    if not measured:
        sys.exit(f"no module offers a kernel for {', '.join(arguments.arch)}")
    if arguments.json:
        document = {
            "triton": triton.__version__,
            "commit": _commit(),
            "cases": [dataclasses.asdict(m) for m in measured],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    failing = sum(bool(m.problems) for m in measured)
    print(f"{len(measured)} cases, triton {triton.__version__}: {failing} failing")
    return int(failing > 0)


if __name__ == "__main__":
    sys.exit(main())
