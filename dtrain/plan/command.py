"""`python -m dtrain plan`."""

import json
from collections.abc import Mapping
from pathlib import Path

from dtrain.config import RunConfig
from dtrain.plan.devices import device
from dtrain.plan.estimate import Rates
from dtrain.plan.fit import find_fit
from dtrain.plan.plan import make_plan
from dtrain.plan.report import record, rows
from dtrain.plan.timeline import draw_timeline

__all__ = ["plan"]


def plan(
    config: RunConfig, gpus: int, gpu: str, links: Mapping[str, float], out: Path | None, fit: bool
) -> tuple[str, list[tuple[str, str]], bool]:
    """A title, rows for a table, and whether it fits; files in `out`.

    Raises:
        ValueError: config, number of GPUs or device do not fit each other.
    """
    rates, planned = Rates(**links), device(gpu)  # type: ignore[arg-type]
    found, tried = find_fit(config, gpus, planned, rates) if fit else (None, [])
    if fit and found is None:
        tried.append(("--fit", "nothing that was tried fits; what follows is the config as it is"))
    made = found or make_plan(config, gpus, planned, rates)
    table = [*tried, *rows(made)]
    if out is not None:
        picture = draw_timeline(made, out / "timeline.png")
        (out / "plan.json").write_text(json.dumps(record(made), indent=1) + "\n", "utf-8")
        table.append(("drawn", str(picture)))
    return f"plan of {config.name}: nothing was trained", table, made.fits
