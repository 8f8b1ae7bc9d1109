"""What `dtrain.kernels.aot` compiles in the tests: shipped kernels, without what another GPU stands for.

Of NVIDIA's GPUs, sm_90 stands for the others where a kernel is launched alike and multiplies no matrices.
"""

from collections.abc import Iterator

from dtrain.kernels import aot
from dtrain.kernels.launch import AotCase

__all__ = ["aot_cases"]


def aot_cases() -> Iterator[AotCase]:
    every = list(aot.cases())
    on_hopper = {case.name: case for case in every if case.arch == "sm_90"}
    for case in every:
        stands_for_it = on_hopper[case.name]
        alike = (case.constexprs, case.options) == (stands_for_it.constexprs, stands_for_it.options)
        if case.arch in ("sm_90", "gfx942") or case.tensor_cores or not alike:
            yield case
