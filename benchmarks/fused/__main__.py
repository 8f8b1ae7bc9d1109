"""`python -m benchmarks.fused`: norms, MLP, quantisation, AdamW, a block, a training step; against PyTorch's.

The exit status is 1 where our kernels did not run in some case or one of their gates is red.
"""

import sys
from collections.abc import Sequence

from benchmarks.fused.plans import fused_plans
from benchmarks.fused.plot import plot
from benchmarks.sweep.command import run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("fused", __doc__, fused_plans, plot, argv)


if __name__ == "__main__":
    sys.exit(main())
