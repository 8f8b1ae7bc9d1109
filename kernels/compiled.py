"""C++ sources beside the kernels, compiled for the machine at hand once and loaded.

What PyTorch does on a CPU in several passes over memory, a loop does in one. A user's machine may lack a
compiler: then `load` says why, and PyTorch serves.

Libraries lie in `$XDG_CACHE_HOME/dtrain`, by default `~/.cache/dtrain`, under a name made of the source, the
flags, and what the compiler says of itself and of the CPU: unlike machines may share the folder. Ranks that
start together wait for the first of them, and a library appears under its name when it is whole.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["load"]

# `-ffp-contract=off`: every step is rounded by itself, as in PyTorch. None of them changes a result.
_FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
)  # fmt: skip
_TIMEOUT_S = 300


@functools.cache
def load(name: str) -> ctypes.CDLL | str:
    """The library of a source in this folder, such as "quantize_cpu.cpp", or why there is none."""
    compiler = _compiler()
    if compiler is None:
        return "there is no g++ on PATH, and CXX names no compiler"
    try:
        return ctypes.CDLL(str(_library(Path(__file__).with_name(name), compiler)))
    except subprocess.CalledProcessError as error:
        return f"{compiler} does not compile {name}: {str(error.stderr).strip()[-500:]}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: there is no home
        return f"{name} cannot be compiled and kept: {error}"


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++"))), None)


def _library(source: Path, compiler: str) -> Path:
    """Its path, where it lies by now."""
    code = source.read_bytes()
    native = _output(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    key = hashlib.sha256(b"\0".join([code, " ".join(_FLAGS).encode(), native.encode()])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrain"
    library = folder / f"{source.stem}-{key[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(library.with_suffix(".lock")):
            if not library.exists():
                _compile(source, compiler, library)
    return library


def _compile(source: Path, compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        whole = Path(folder) / library.name
        _output(compiler, *_FLAGS, str(source), "-o", str(whole))
        whole.replace(library)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """While no other process of this machine is; without it each would compile, to the same end."""
    try:
        import fcntl
    except ImportError:  # not POSIX
        yield
        return
    with lock.open("w") as file:
        with contextlib.suppress(OSError):  # of file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S).stdout
