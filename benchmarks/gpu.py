"""All that waits for a GPU, in one go: its tests, the sweeps, overlap with collectives, memory, the tuner.

`python -m benchmarks.gpu` works from a clone in which nothing is installed, with the packages that are there:
PyTorch, Triton and pytest. Test files that need others are skipped, by name. What a stage leaves of its share
of the time goes to the next ones. A rehearsal runs the same stages at tiny sizes on the CPU, in Triton's
interpreter.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.environment import ROOT

__all__ = ["Outcome", "Stage", "main", "run_stages", "stages"]

_REHEARSAL = {
    "TRITON_INTERPRET": "1", "DTRAIN_REHEARSAL": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
}  # fmt: skip
_TAIL_LINES = 60


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        arguments: of Python; "{seconds}" stands for the time that it may plan with.
        share: of the time that is left, relative to the shares of the stages after it.
    """

    name: str
    arguments: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Outcome:
    """How a stage ended; exit code -9 where its time was over."""

    name: str
    exit_code: int
    seconds: float
    command: str


def stages(out: Path, rehearse: bool) -> Iterator[Stage]:
    """The commands of a run; their files go to `out`."""
    files, missing = _gpu_tests(rehearse)
    for reason in missing:
        print(f"skipped: {reason}", flush=True)
    side_by_side = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    pytest = ("-m", "pytest", "-q", "-ra", "--tb=short", "-p", "no:cacheprovider")
    yield Stage("tests", (*pytest, *side_by_side, "-m", "gpu", *files), share=4)
    if not rehearse:  # what the CPU tests in the interpreter, compiled
        compilers = (f"--ignore=tests/kernels/test_{name}.py" for name in ("aot", "tune"))
        yield Stage(
            "kernels", (*pytest, *side_by_side, "-m", "not gpu", *compilers, "tests/kernels"), share=2
        )
    sweep = ("--quick", "--plot", "--out", str(out), "--budget-s", "{seconds}")
    on_cpu = ("--device", "cpu") if rehearse else ()
    yield Stage("attention", ("-m", "benchmarks.attention", *sweep, *on_cpu), share=4)
    yield Stage("fused", ("-m", "benchmarks.fused", *sweep, *on_cpu), share=6)
    scale = ("--out", str(out / "scale"))
    yield Stage("overlap", ("-m", "benchmarks.scale.overlap", *scale, *on_cpu), share=1)
    codecs = () if rehearse else ("--codecs", str(out / "fused.json"))
    yield Stage("scale", ("-m", "benchmarks.scale", *scale, *codecs), share=0.5)
    ladder = ("-m", "benchmarks.ladder", "--measure", "--out", str(out / "ladder"), "--budget-s", "{seconds}")
    # What fits a GPU's minutes comes first; what does not is left out by name.
    rungs = ("--worlds", "8", "--workloads", "2b-33k", "h2", "xl2", "2b-131k")
    few = ("--rehearse", "--worlds", "8", "--workloads", "xl2", "--rungs", "B1", "host")
    yield Stage("ladder", (*ladder, *(few if rehearse else rungs)), share=8)
    tables = ("--json", str(out / "tiles.json"), "--log", str(out / "tune.json"), "--budget-s", "{seconds}")
    sizes = ("--device", "cpu", "--head-dim", "64", "--limit", "1", "--tokens", "40", "--workers", "1")
    tune = ("-m", "dtrain.kernels.tune", *tables, *(sizes if rehearse else ("--limit", "12")))
    yield Stage("tune", tune, share=2)


def run_stages(chosen: Sequence[Stage], out: Path, budget_s: float, rehearse: bool) -> list[Outcome]:
    """Run one after the other; outcomes also go to `out/gpu.json`, all that they print to `out/gpu.log`."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "160",
    }
    environment |= _REHEARSAL if rehearse else {}
    deadline = time.perf_counter() + budget_s
    outcomes: list[Outcome] = []
    with (out / "gpu.log").open("w", encoding="utf-8") as log:
        for i, stage in enumerate(chosen):
            left = max(1.0, deadline - time.perf_counter())
            seconds = left * stage.share / sum(s.share for s in chosen[i:])
            outcomes.append(_run(stage, seconds, environment, log.fileno()))
            print(_summary(outcomes[-1], out / "gpu.log"), flush=True)
            (out / "gpu.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n", "utf-8")
    return outcomes


def _run(stage: Stage, seconds: float, environment: Mapping[str, str], log: int) -> Outcome:
    planned = f"{max(1.0, 0.85 * seconds - 5):.0f}"  # to stop by itself rather than be stopped
    command = [sys.executable, *(word.format(seconds=planned) for word in stage.arguments)]
    os.write(log, f"==== {stage.name}: {' '.join(command)}\n".encode())
    begin = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    ) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it has started
            code = process.wait()
    return Outcome(stage.name, code, round(time.perf_counter() - begin, 1), " ".join(command))


def _summary(outcome: Outcome, log: Path) -> str:
    whole = log.read_text("utf-8", errors="replace").rpartition("==== ")[2]
    verdict = "passed" if outcome.exit_code == 0 else f"FAILED, exit code {outcome.exit_code}"
    tail = whole.splitlines()[1:][-_TAIL_LINES:]
    return "\n".join([*tail, f"==== {outcome.name}: {verdict} after {outcome.seconds} s"])


def _gpu_tests(rehearse: bool) -> tuple[list[str], list[str]]:
    """Test files with tests for a GPU, and why others of them cannot be imported here."""
    pattern = re.compile(r"mark\.gpu\(rehearsal=True\)" if rehearse else r"mark\.gpu\b")
    paths = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if pattern.search(p.read_text("utf-8"))]
    packages = dict(zip((str(p.relative_to(ROOT)) for p in paths), _missing(paths), strict=True))
    skipped = [f"{name}: needs the package {package}" for name, package in packages.items() if package]
    return [name for name, package in packages.items() if not package], skipped


# Prints, for each file, the package that it or its folder's conftest imports in vain. Any other fault is
# pytest's to show.
_PROBE = """
import pathlib, runpy, sys
for path in map(pathlib.Path, sys.argv[1:]):
    missing = ""
    for file in (path.parent / "conftest.py", path):
        try:
            file.exists() and runpy.run_path(str(file), run_name="probe")
        except ModuleNotFoundError as error:
            missing = error.name or ""
        except BaseException:
            pass
    print(f"missing:{missing}")
"""
_OURS = ("dtrain", "uvit", "benchmarks", "tests")


def _missing(paths: Sequence[Path]) -> list[str]:
    """By file, the package that is not installed; empty where all are."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *map(str, paths)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    names = re.findall(r"^missing:(.*)$", done.stdout, re.MULTILINE)
    return ["" if name.partition(".")[0] in _OURS else name for name in names]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="All that waits for a GPU.")
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu"), help="folder for logs, results, tables"
    )
    parser.add_argument("--budget-s", type=float, default=570.0, help="seconds for all stages together")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, in the interpreter")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STAGE",
        help="of tests, kernels, attention, fused, overlap, scale, ladder and tune",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 where a stage failed."""
    begin = time.perf_counter()
    arguments = _arguments(argv)
    out: Path = arguments.out.resolve()
    known = {stage.name: stage for stage in stages(out, arguments.rehearse)}
    for name in arguments.only or ():
        if name not in known:
            print(f"error: --only = {name}: must be one of {', '.join(known)}", file=sys.stderr)
            return 2
    chosen = [known[name] for name in known if name in (arguments.only or known)]
    left = arguments.budget_s - (time.perf_counter() - begin)
    outcomes = run_stages(chosen, out, left, arguments.rehearse)
    for outcome in outcomes:
        print(f"{outcome.name:10} exit code {outcome.exit_code:3}  {outcome.seconds:6.1f} s")
    return int(any(outcome.exit_code for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
