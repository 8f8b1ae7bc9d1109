"""Loads a checkpoint on the ranks of a run and saves it again: `… -m tests.faults.rewrite CONFIG SETS…`."""

import sys
from pathlib import Path

from dtrain.config import build_recipe, load
from dtrain.dist import process_group
from dtrain.trainer import Trainer


def main(config: str, *sets: str) -> None:
    loaded = load(Path(config), sets)
    with process_group() as world:
        trainer = Trainer(loaded, build_recipe(loaded), world)
        trainer.checkpointer.save(trainer.state, trainer.progress)
        trainer.checkpointer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
