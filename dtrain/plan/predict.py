"""The planned peak of a run's rank 0, for a run that has begun: `python -m dtrain.plan.predict`.

A process of its own: a plan needs a process group of ranks that do not exist, and a run has one already. It
sees no GPU and yields to whatever else runs on the host. See `dtrain.metrics.memory`, which starts it.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from dtrain.config import load
from dtrain.plan.peak import find_peak
from dtrain.plan.simulate import simulate

__all__ = ["main"]


class _Said(logging.Handler):
    """Keeps what the planner says of what it leaves out."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(config: str, ranks: str, arch: str, out: str, *sets: str) -> None:
    """Plan, and write the answer whole or not at all: `peak_bytes`, null where there is none, and `said`.

    Args:
        config: a run's config file.
        ranks: of the run.
        arch: of its GPUs, such as "sm_90"; "" on CPU ranks. Memory depends on nothing else of a GPU.
        out: JSON file to write.
        sets: overrides of the config.
    """
    os.nice(19)
    said = _Said()
    logger = logging.getLogger("dtrain.plan")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    answer: dict[str, Any]
    try:
        peak = find_peak(simulate(load(Path(config), sets), int(ranks), arch))
        answer = {"peak_bytes": peak.nbytes, "said": [peak.when, *said.lines], "kinds": peak.kinds}
    except ValueError as error:  # of a config that cannot be planned
        answer = {"peak_bytes": None, "said": [str(error)]}
    part = Path(out).with_suffix(".part")
    part.write_text(json.dumps(answer, indent=1) + "\n", "utf-8")
    part.replace(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
