"""Model, optimizer, averages and what collectives remember, as one tree of tensors that any mesh can load."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from dtrain.checkpoint.storage import Reader
from dtrain.comm.state import CommState
from dtrain.optim import EMA
from dtrain.sharding.precision import DTYPES

__all__ = ["TrainingState"]

log = logging.getLogger(__name__)


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
        reader = Reader(folder)
        saved = reader.tensors()
        tree = self.tensors()
        _check_moments(tree["optim"], saved, folder)
        _say_conversion("optim.weights", "model", tree, saved, folder)
        _say_conversion("ema.dtype", "ema", tree, saved, folder)
        if self.comm:
            tree["comm"] = self.comm.room(_below("comm.", saved))
        states = tree["optim"]
        tree["optim"] = {name: states[name] for name in states if _below(f"optim.{name}.", saved)}
        load(tree, storage_reader=reader)
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
