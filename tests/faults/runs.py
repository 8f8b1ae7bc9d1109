"""Runs of the faulty recipe under torchrun, and what they leave."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from dtrain.checkpoint import step_folders
from tests.checkpoints import all_tensors
from tests.launch import torchrun

__all__ = ["Run", "assert_same_weights"]

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
        config = self.folder / f"{self.name}.toml"
        self.path.mkdir(parents=True, exist_ok=True)
        config.write_text(CONFIG.format(output=self.folder) + f"faults = {json.dumps(faults)}\n")
        settings = [f"name={self.name}", f"faulty.folder={self.path}", *sets]
        words = [word for setting in settings for word in ("--set", setting)]
        options = ("--max-restarts", str(restarts)) if restarts else ()
        return torchrun(self.ranks, *options, "-m", "dtrain", "train", config, *words, check=check)

    @property
    def steps(self) -> list[int]:
        """Of its checkpoints."""
        return [int(path.name.removeprefix("step-")) for path in step_folders(self.path / "checkpoints")]

    @property
    def notes(self) -> list[str]:
        lines = (json.loads(line) for line in (self.path / "metrics.jsonl").open())
        return [line["note"] for line in lines if "note" in line]


def assert_same_weights(run: Run, other: Run, step: int = 20) -> None:
    """Bit for bit: weights, moments, averages and whatever else a checkpoint holds."""
    folders = [each.path / "checkpoints" / f"step-{step:08d}" for each in (run, other)]
    mine, theirs = map(all_tensors, folders)
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]
