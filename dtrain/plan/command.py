"""`python -m dtrain plan`."""

import json
from collections.abc import Mapping
from pathlib import Path

from dtrain.config import RunConfig
from dtrain.plan.devices import device
from dtrain.plan.estimate import Rates
from dtrain.plan.fit import Fit, find_fit
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
    found = find_fit(config, gpus, planned, rates) if fit else None
    made = (found and found.plan) or make_plan(config, gpus, planned, rates)
    table = [*(_chosen(found) if found else []), *rows(made)]
    if out is not None:
        picture = draw_timeline(made, out / "timeline.png")
        (out / "plan.json").write_text(json.dumps(record(made), indent=1) + "\n", "utf-8")
        table.append(("drawn", str(picture)))
    return f"plan of {config.name}: nothing was trained", table, made.fits


def _chosen(found: Fit) -> list[tuple[str, str]]:
    """What `--fit` tried, what it took, and what of that changes numbers."""
    if found.plan is None:
        return [*found.tried, ("--fit", "nothing that was tried fits; what follows is the config as it is")]
    words = [("--fit takes", " ".join(f"--set {name}={value}" for name, value in found.settings.items()))]
    if found.rounds:
        words.append(("  ROUNDS", f"{', '.join(found.rounds)}: numbers change, and nothing exact fits"))
    return [*found.tried, *words]
