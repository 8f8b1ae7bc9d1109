"""Does compression change what a model learns? `python -m benchmarks.accuracy`

The same small video U-ViT is trained with each communication preset, with parts of them left out, and by name
with weights, moments, averages and stashed activations of fewer bits, on four ranks, from the same initial
weights, on the same clips, times and noises for the same seed. The loss on clips that no training has seen,
with the master weights and with their averages, is held against what the seed alone does to it without
compression:

  within std      the means differ by no more than one standard deviation of the seeds without compression
  within range    by no more than the distance between the best and the worst of them
  OUTSIDE         by more
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.compare import faults
from benchmarks.accuracy.launch import run_study
from benchmarks.accuracy.plot import plot
from benchmarks.accuracy.settings import Settings
from benchmarks.accuracy.study import read
from benchmarks.accuracy.table import table
from benchmarks.accuracy.variants import VARIANTS, chosen

__all__ = ["main"]

_EXAMPLES = f"""
examples:
  python -m benchmarks.accuracy                             all of it
  python -m benchmarks.accuracy --steps 200 --seeds 0 1     a first look
  python -m benchmarks.accuracy --variants int8 int4-delta  two presets beside the baseline
  python -m benchmarks.accuracy --variants "8-bit moments" "int8 stash"
                                                            what saves memory
  python -m benchmarks.accuracy --show                      table and picture of the study that is there

variants: {"; ".join(name for name, v in VARIANTS.items() if not v.extra)}
by name only: {"; ".join(name for name, v in VARIANTS.items() if v.extra)}

In OUT: accuracy.json, written after every training (an interrupted study keeps what has finished), and
accuracy.png. Exit status 1: a training failed, ranks decoded different weights, a second training gave other
bits, or what should have been compressed was not. A loss outside of the range is a result, not a fault.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out.resolve()
    try:
        if arguments.show:
            study = read(out / "accuracy.json")
        else:
            study = run_study(_settings(arguments), chosen(arguments.variants), out, arguments.jobs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plot(study, out / "accuracy.png")
    print(table(study))
    return int(bool(faults(study.outcomes)))


def _settings(arguments: argparse.Namespace) -> Settings:
    default = Settings()
    return Settings(
        steps=arguments.steps,
        ranks=arguments.ranks,
        seeds=tuple(arguments.seeds),
        points=min(default.points, arguments.steps),
        repeat=min(default.repeat, arguments.steps),
    )


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=default.steps, help=f"of each training [{default.steps}]")
    add("--seeds", type=int, nargs="+", default=list(default.seeds), help="one training each [0 1 2]")
    add("--ranks", type=int, default=default.ranks, help=f"processes of a training [{default.ranks}]")
    add("--variants", nargs="+", metavar="VARIANT", help="beside the baseline [all but those by name only]")
    add("--jobs", type=int, default=1, help="variants that train at the same time [1]")
    add("--out", type=Path, default=Path("build/accuracy"), help="folder [build/accuracy]")
    add("--show", action="store_true", help="train nothing")
    return parser


def _stopped(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt  # whose way out ends the ranks, which are in sessions of their own


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stopped)
    sys.exit(main())
