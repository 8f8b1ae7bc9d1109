"""The command line of a sweep, by argparse: it must run where PyTorch and Triton alone are installed."""

import argparse
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.sweep.plan import Kind, Plan
from benchmarks.sweep.run import Sweep, run_plans
from benchmarks.sweep.table import sound, table

__all__ = ["run_command"]


def run_command(
    name: str,
    description: str | None,
    plans: Callable[[Kind, bool], Iterable[Plan]],
    plot: Callable[[Sweep, Path], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Measure, write `name`.json, print the table.

    Args:
        plans: of a device and of whether the run is to be quick.
        plot: draws the sweep to a file.
    Returns: the exit status: 1 where our kernels did not run in some case or one of their gates is red.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _arguments(name, description, argv)
    out: Path = arguments.out
    chosen = plans(arguments.device, arguments.quick)
    sweep = run_plans(chosen, arguments.device, out / f"{name}.json", arguments.budget_s)
    if arguments.plot:
        plot(sweep, out / f"{name}.png")
    print(table(sweep))
    return int(not sound(sweep))


def _arguments(name: str, description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--out", type=Path, default=Path("build") / name, help=f"folder for {name}.json")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=540.0,
        help="seconds after which no case starts; the largest are last",
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu: tiny sizes that rehearse the run, with TRITON_INTERPRET=1 in the environment",
    )
    parser.add_argument("--plot", action="store_true", help=f"draw {name}.png too")
    return parser.parse_args(argv)
