"""Checkpoints: the whole state of a run on disk, written while training goes on.

One folder per checkpoint, `step-00000100/`, in PyTorch's distributed checkpoint format: every rank writes its
own shards, and any other mesh may read them. A checkpoint is written under a temporary name and renamed when
all of it is there, so that a folder of the final name is always whole.
"""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from dtrain.comm.state import CommState
from dtrain.ema import EMA
from dtrain.moments import room_for_codes, take_codes
from dtrain.precision import DTYPES

log = logging.getLogger(__name__)

_PROGRESS = "progress.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, where to resume."""

    every: int = field(
        default=1000, metadata={"help": "Save every this many steps; the last is always saved."}
    )
    keep: int = field(
        default=3, metadata={"help": "Newest checkpoints that are kept; older ones are deleted."}
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto: newest checkpoint of the run, if any. never: start anew (the run must have none). "
            "Or the path of one checkpoint folder."
        },
    )

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} = {getattr(self, name)}: must be 1 or more.")


@dataclass(frozen=True)
class Progress:
    """Where a run stands. All random streams follow from `seed` and these counts."""

    step: int
    """Optimizer steps taken."""
    sample: int
    """Samples trained on: the global index of the next one."""
    seed: int
    world: int
    """World size that wrote the checkpoint, for information."""
    fingerprint: str
    """Of the data, empty when the recipe has none."""


class TrainingState:
    """Model, optimizer and EMA as one tree of (sharded) tensors."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        comm: CommState | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self.comm = comm

    def tensors(self) -> dict[str, Any]:
        """The live tensors; loading into them in place loads model and EMA."""
        tree: dict[str, Any] = {
            "model": get_model_state_dict(self.model),
            # Hyperparameters belong to the config: only the optimizer's tensors are state.
            "optim": get_optimizer_state_dict(self.model, self.optimizer)["state"],
        }
        tree |= {"ema": dict(self.ema.shards)} if self.ema else {}
        return tree | ({"comm": self.comm.tensors()} if self.comm else {})

    def load(self, folder: Path) -> None:
        """Fill everything from a checkpoint folder, whatever mesh wrote it.

        Weights and averages may have been kept in another precision, which is said: bf16 comes exactly into
        fp32, and fp32 is rounded to nearest once, as blocks that compute in bf16 round it at every step.

        Raises:
            ValueError: its optimizer kept moments of another kind.
        """
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
        tree = self.tensors()
        _check_moments(tree["optim"], saved, folder)
        _say_conversion("optim.weights", "model", tree, saved, folder)
        _say_conversion("ema.dtype", "ema", tree, saved, folder)
        if self.comm:
            tree["comm"] = self.comm.room(_below("comm.", saved))
        states = tree["optim"]
        there = {name: _below(f"optim.{name}.", saved) for name in states}
        coded = {name: room_for_codes(state, there[name]) for name, state in states.items()}
        tree["optim"] = {name: coded[name] or state for name, state in states.items() if there[name]}
        load(tree, checkpoint_id=folder)
        for name, codes in coded.items():
            if codes:
                take_codes(states[name], codes)
        if self.comm:
            self.comm.load(tree["comm"])
        groups = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        set_optimizer_state_dict(self.model, self.optimizer, {"state": states, "param_groups": groups})
        # A parameter that had no gradient yet had no state either.
        for name, parameter in self.model.named_parameters():
            if name in states and name not in tree["optim"]:
                self.optimizer.state.pop(parameter, None)


def _below(prefix: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}


def _check_moments(states: dict[str, Any], there: Mapping[str, Any], folder: Path) -> None:
    coded = any("exp_avg_codes" in state for state in states.values())
    if coded != any(key.endswith(".exp_avg_codes") for key in there):
        ours, other = ("8bit", "fp32") if coded else ("fp32", "8bit")
        raise ValueError(
            f'optim.moments = "{ours}", but {folder} has moments of another kind: set '
            f'optim.moments = "{other}", or start a new run.'
        )


def _say_conversion(
    field: str, part: str, tree: Mapping[str, Any], there: Mapping[str, Any], folder: Path
) -> None:
    """Say once if what is loaded has another dtype than what it is loaded into."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    found = _below(f"{part}.", there)
    pairs = {
        (names[found[name].properties.dtype], names[tensor.dtype])
        for name, tensor in tree.get(part, {}).items()
        if name in found and found[name].properties.dtype in names and tensor.dtype in names
    }
    for theirs, ours in sorted(pairs):
        if theirs != ours and dist.get_rank() == 0:
            how = "rounded to nearest, once" if ours == "bf16" else "taken exactly"
            log.warning('%s = "%s": what %s has in %s is %s.', field, ours, folder, theirs, how)


def step_folders(folder: Path) -> list[Path]:
    """All whole checkpoints below `folder`, oldest first."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and (p / _PROGRESS).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The newest checkpoint below `folder`, or that of `step`.

    Raises:
        FileNotFoundError: there is none; the message lists those that there are.
    """
    found = step_folders(folder)
    if step is not None:
        found = [path for path in found if int(path.name.removeprefix("step-")) == step]
    if not found:
        have = ", ".join(path.name for path in step_folders(folder)) or "none"
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise FileNotFoundError(f"{folder}: {wanted} is here (found: {have}).")
    return found[-1]


def read_progress(checkpoint: Path) -> Progress:
    """The progress record of one checkpoint folder."""
    return Progress(**json.loads((checkpoint / _PROGRESS).read_text()))


class Checkpointer:
    """Saves asynchronously, one save at a time, and keeps the newest few.

    Every rank owns one and calls `save`, `poll` and `wait` at the same steps.

    Args:
        folder: where checkpoint folders lie.
        config: how many are kept.
        group: a process group with a CPU backend of the checkpointer's own, because saving runs its
            collectives on a background thread.
        is_main: this rank names, renames and deletes.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, group: dist.ProcessGroup, is_main: bool
    ) -> None:
        self.folder = folder
        self.config = config
        self.group = group
        self.is_main = is_main
        self._pending: tuple[Future[Any], Path, Progress] | None = None

    def save(self, state: TrainingState, progress: Progress) -> None:
        """Copy the state to host memory and write it in the background; waits for an unfinished save."""
        self.wait()
        partial = self.folder / f"partial-{progress.step:08d}"
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier(self.group)
        writing = async_save(state.tensors(), checkpoint_id=partial, process_group=self.group)
        assert isinstance(writing, Future)
        self._pending = (writing, partial, progress)

    def poll(self) -> None:
        """Finish a save whose writing is done; never blocks."""
        if self._pending and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Block until the save in flight, if any, is whole under its final name."""
        if self._pending is None:
            return
        writing, partial, progress = self._pending
        self._pending = None
        writing.result()
        if self.is_main:
            (partial / _PROGRESS).write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n")
            final = self.folder / f"step-{progress.step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._delete_old()

    def _delete_old(self) -> None:
        for old in step_folders(self.folder)[: -self.config.keep]:
            shutil.rmtree(old)


def resume_folder(config: CheckpointConfig, folder: Path) -> Path | None:
    """The checkpoint that a run continues from, or None for a fresh start.

    Raises:
        ValueError: `resume` forbids or names something that the disk contradicts.
    """
    found = step_folders(folder)
    if config.resume == "auto":
        return found[-1] if found else None
    if config.resume == "never":
        if found:
            raise ValueError(
                f'checkpoint.resume = "never", but {folder} already holds {found[-1].name}: '
                "choose another name for the run, or move that folder away."
            )
        return None
    chosen = Path(config.resume)
    if not (chosen / _PROGRESS).is_file():
        raise ValueError(f"checkpoint.resume = {config.resume!r}: no whole checkpoint is there.")
    return chosen
