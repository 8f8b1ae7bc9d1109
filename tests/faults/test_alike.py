"""Ranks that were started with another config or other code than the first are refused, by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import Run
from tests.launch import ROOT, TORCHRUN

pytestmark = pytest.mark.distributed


def trained(run: Run, words: str) -> str:
    """What two ranks say that a shell starts, which may give each something else by its RANK."""
    path = f"PYTHONPATH={run.folder}/code-$RANK:{ROOT}"
    line = f"{path} exec {sys.executable} -m dtrain train {run.config()} {words}"
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--no-python", "bash", "-c", line]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=run.folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode
    assert not run.steps
    return done.stderr


@pytest.mark.parametrize("of", ["config", "code"])
def test_ranks_that_are_not_alike_do_not_train(of: str, tmp_path: Path) -> None:
    run = Run(tmp_path, "run")
    for rank in range(2):
        (tmp_path / f"code-{rank}").mkdir()
        lines = ["from tests.faults.faulty import recipe", "__all__ = ['recipe']"]
        comment = f"# written for rank {rank}" if of == "code" else ""
        (tmp_path / f"code-{rank}" / "mine.py").write_text("\n".join([*lines, comment]))
    sets = [*run.settings(), "recipe=mine:recipe", "optim.lr=1e-$RANK" if of == "config" else "optim.lr=1e-3"]
    said = trained(run, " ".join(f"--set {json.dumps(each)}" for each in sets))
    assert f"error: Ranks 1 have other {of} than rank 0." in said
    assert "]: Traceback" not in said
