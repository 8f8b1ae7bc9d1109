"""Starting real processes: torchrun on this machine, and the dtrain command line."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def run_python(
    *arguments: str | Path, check: bool = True, timeout_s: float = 480
) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` in a process of its own, from an uninstalled clone's point of view."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    return done


def torchrun(ranks: int, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node RANKS *arguments` on a free port."""
    options = ("--standalone", "--nproc-per-node", str(ranks))
    return run_python(*TORCHRUN[1:], *options, *arguments, check=check)
