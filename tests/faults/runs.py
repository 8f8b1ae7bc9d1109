"""Runs of the faulty recipe under torchrun, and what they leave."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint import step_folders
from tests.checkpoints import all_tensors
from tests.launch import ENVIRONMENT, ROOT, TORCHRUN, torchrun

__all__ = ["BATCH", "Run", "Tell", "assert_same_weights"]

Tell = Callable[..., None]  # see the fixture `told`

BATCH = 4  # global
CONFIG = """
recipe = "tests.faults.faulty:recipe"
output = "{output}"
seed = 3
[train]
steps = 20
global_batch = 4
micro_batch = 1
timeout_s = 120
[optim]
lr = 1e-3
warmup_steps = 15
clip_norm = 0.5
[checkpoint]
every = 4
[faults]
hang_s = 60
[metrics]
log_every = 1
tensorboard = false
[model]
dropout = 0.1
[faulty]
folder = "{output}"
"""


@dataclass(frozen=True)
class Run:
    """A run's folder, and how it is started.

    Attributes:
        folder: of all runs of a test.
        name: of this one.
        ranks: processes.
    """

    folder: Path
    name: str
    ranks: int = 2

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def train(
        self, *faults: str, sets: tuple[str, ...] = (), restarts: int = 0, check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """To the end, or to where a fault ends it."""
        config, settings = self.config(*faults), self.settings(*sets)
        words = [word for setting in settings for word in ("--set", setting)]
        options = ("--max-restarts", str(restarts)) if restarts else ()
        return torchrun(self.ranks, *options, "-m", "dtrain", "train", config, *words, check=check)

    @contextmanager
    def started(self, *options: str, sets: tuple[str, ...] = ()) -> "Iterator[subprocess.Popen[bytes]]":
        """Torchrun at work on it, which has taken its first step; it is ended behind the block.

        Args:
            options: of torchrun.
            sets: of the run.
        """
        settings = [word for setting in self.settings(*sets) for word in ("--set", setting)]
        command = [*TORCHRUN, "--nproc-per-node", str(self.ranks), *options, "-m", "dtrain", "train"]
        command += [str(self.config()), *settings]
        environment = os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
        with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            try:
                self._wait_for_a_step(process)
                yield process
            finally:
                process.terminate()

    def _wait_for_a_step(self, process: "subprocess.Popen[bytes]") -> None:
        file = self.path / "metrics.jsonl"
        for _ in range(1200):
            if file.exists() and '"step"' in file.read_text():
                return
            assert process.poll() is None
            time.sleep(0.1)
        raise AssertionError(f"no step in {file}")

    def config(self, *faults: str) -> Path:
        """Written to its file."""
        file = self.folder / f"{self.name}.toml"
        self.path.mkdir(parents=True, exist_ok=True)
        file.write_text(CONFIG.format(output=self.folder) + f"faults = {json.dumps(faults)}\n")
        return file

    def settings(self, *sets: str) -> list[str]:
        """Of this run, beside the file."""
        return [f"name={self.name}", f"faulty.folder={self.path}", *sets]

    @property
    def steps(self) -> list[int]:
        """Of its checkpoints."""
        return [int(path.name.removeprefix("step-")) for path in step_folders(self.path / "checkpoints")]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").open()]

    @property
    def notes(self) -> list[str]:
        return [line["note"] for line in self.lines if "note" in line]

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return found

    def seconds_to_save(self, fault: str, step: int) -> float:
        """From a fault until the checkpoint of a step is on the disk."""
        sums = self.path / "checkpoints" / f"step-{step:08d}" / "SHA256SUMS"
        return round(sums.stat().st_mtime - self._since(fault), 1)

    def recovery(self, fault: str) -> dict[str, Any]:
        """Of a fault such as "kill 30": steps trained again, and seconds until its step was done."""
        since, step = self._since(fault), int(fault.split()[1]) // BATCH + 1
        after = [line for line in self.lines if line["time"] > since]
        resumed = next((n["note"].split()[3] for n in after if n.get("note", "").startswith("resumed")), None)
        done = next(line["time"] for line in after if line.get("step", 0) >= step)
        lost = step - 1 - int(resumed.rstrip(",")) if resumed else 0
        return {"steps_lost": lost, "seconds": round(done - since, 1)}

    def _since(self, fault: str) -> float:
        kind, sample = fault.split()[:2]
        return (self.path / f"{kind}-{sample}").stat().st_mtime


def assert_same_weights(run: Run, other: Run, step: int = 20) -> int:
    """Bit for bit: weights, moments, averages and whatever else a checkpoint holds; how many tensors."""
    folders = [each.path / "checkpoints" / f"step-{step:08d}" for each in (run, other)]
    mine, theirs = map(all_tensors, folders)
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]
    return len(mine)
