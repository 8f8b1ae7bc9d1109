"""Finds the fastest tiles on the GPU at hand, and who serves where; writes them as a DTRAIN_TILES file.

Offline, since timing inside a training step stalls it and ranks that time alone choose differently:

    python -m dtrain.kernels.tune [--head-dim 64 72] [--budget-s 600] --json tiles.json
    DTRAIN_TILES=tiles.json torchrun ...

For every head dim and pass the candidates are compiled in processes of their own, where a launch finds them,
and those that spill or ask for too much shared memory drop out. The others are launched, held against the
fp64 reference, and timed; the fastest few are timed again, for longer. Then both forms of our backward and
PyTorch's kernels are timed at several lengths, forwards and backwards together: the choices.
`--dry-run --arch sm_90` compiles and lists.
"""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dtrain.kernels import tune_attention as op
from dtrain.kernels.launch import HAS_TRITON, SHARED_BYTES, can_launch, triton
from dtrain.kernels.tune_search import Deadline, Timing, Tuner, judge

__all__ = ["main"]

_log = logging.getLogger(__name__)


@contextmanager
def _compilers(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile: without TRITON_INTERPRET, which this one may have for a rehearsal."""
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in range(workers):
            pool.submit(int)  # starts a process, in the environment as it is now
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted
        yield pool
        pool.shutdown(wait=False, cancel_futures=True)


def _dry_run(arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> int:
    """Compile the candidates of an architecture and list them; no GPU is needed."""
    kept = 0
    for head_dim in arguments.head_dim:
        for name in arguments.passes:
            listed = op.candidates(name, arguments.arch, head_dim)[: arguments.limit]
            for tile, measured in zip(
                listed, pool.map(judge, [(name, arguments.arch, head_dim, t) for t in listed]), strict=True
            ):
                kept += not measured.problems
                verdict = "; ".join(measured.problems) or f"{measured.registers} registers"
                print(f"{name:15} D={head_dim:<3} {tile}: {verdict}", flush=True)
    print(f"{kept} candidates are left on {arguments.arch}")
    return int(not kept)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dtrain.kernels.tune",
        description="Find the fastest launch parameters on this GPU; write them as a DTRAIN_TILES file.",
    )
    parser.add_argument("--op", choices=["attention"], default="attention", help="operation to tune")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 72, 96, 128], metavar="D")
    parser.add_argument("--passes", nargs="+", choices=op.PASSES, default=list(op.PASSES), metavar="PASS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there, for DTRAIN_TILES")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write every timing there")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="seconds after which nothing starts")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a timed call")
    parser.add_argument("--limit", type=int, default=1000, help="candidates of a pass, the shipped one first")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="compilers")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu rehearses a run")
    parser.add_argument(
        "--dry-run", action="store_true", help="list and compile the candidates, time nothing"
    )
    parser.add_argument("--arch", choices=list(SHARED_BYTES), default="sm_90", help="of --dry-run")
    return parser.parse_args(argv)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what cannot run."""
    for head_dim in arguments.head_dim:
        if head_dim not in op.HEAD_DIMS:
            known = f"{op.HEAD_DIMS.start}, {op.HEAD_DIMS[1]} … {op.HEAD_DIMS[-1]}"
            raise ValueError(f"--head-dim = {head_dim}: must be one of {known}")
    if not HAS_TRITON:
        raise ValueError("triton is not installed: there is nothing to tune")
    if arguments.device == "cuda" and not arguments.dry_run and not torch.cuda.is_available():
        raise ValueError("--device = cuda: there is none; --dry-run --arch ARCH compiles without one")
    if arguments.device == "cpu" and not arguments.dry_run and not can_launch(torch.device("cpu")):
        raise ValueError("--device = cpu: set TRITON_INTERPRET=1 in the environment to rehearse a run")


def _write(path: Path | None, content: object) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _timing_row(timing: Timing) -> dict[str, Any]:
    return {**asdict(timing), "ms": timing.ms if math.isfinite(timing.ms) else None}


def _tune(arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> int:
    deadline = Deadline(arguments.budget_s)
    tuner = Tuner(arguments.device, arguments.tokens, arguments.limit, deadline)
    found = tuner.run(arguments.head_dim, arguments.passes, pool)
    for what in deadline.left_out:
        _log.warning("left out, the %.0f s are over: %s", arguments.budget_s, what)
    _write(arguments.json, found.as_file(tuner.arch))
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    versions = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    _write(arguments.log, {**versions, "timings": [_timing_row(t) for t in found.timings]})
    right = sum(not t.problem for t in found.timings)
    print(f"{right} timings, {len(found.choices)} choices; tables in {arguments.json or 'no file (--json)'}")
    return int(not found.tiles)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 where no candidate is left."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _arguments(argv)
    try:
        _check(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with _compilers(arguments.workers) as pool:
        return (_dry_run if arguments.dry_run else _tune)(arguments, pool)


if __name__ == "__main__":
    sys.exit(main())
