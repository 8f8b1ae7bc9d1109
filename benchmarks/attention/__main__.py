"""`python -m benchmarks.attention`: head dims, lengths, both passes, the layer, windows; against PyTorch's.

The exit status is 1 where our kernels did not run in some case or one of their gates is red.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.attention.suite import run_sweep
from benchmarks.attention.table import plot, sound, table


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/attention"), help="folder for attention.json")
    parser.add_argument("--quick", action="store_true", help="fewer head dims, lengths and rounds")
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
    parser.add_argument("--plot", action="store_true", help="draw attention.png too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _arguments(argv)
    out: Path = arguments.out
    sweep = run_sweep(arguments.device, out / "attention.json", arguments.quick, arguments.budget_s)
    if arguments.plot:
        plot(sweep, out / "attention.png")
    print(table(sweep))
    return int(not sound(sweep))


if __name__ == "__main__":
    sys.exit(main())
