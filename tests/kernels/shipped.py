"""What `dtrain.kernels.aot` compiles in the tests: shipped kernels, without what another case stands for.

Of NVIDIA's GPUs, sm_90 stands for the others where a kernel is launched alike and multiplies no matrices. It
has attention of every head dim; elsewhere 72, which is padded, and 128, the largest, stand for the others.
`python -m dtrain.kernels.aot` compiles all of it.
"""

import re
from collections.abc import Iterator

from dtrain.kernels import aot
from dtrain.kernels.launch import AotCase

__all__ = ["aot_cases"]

_OTHER_HEAD_DIMS = re.compile(r"attention\..* D=(?!72 |128 )")


def aot_cases() -> Iterator[AotCase]:
    every = list(aot.cases())
    on_hopper = {case.name: case for case in every if case.arch == "sm_90"}
    for case in every:
        stands_for_it = on_hopper[case.name]
        alike = (case.constexprs, case.options) == (stands_for_it.constexprs, stands_for_it.options)
        another = case.arch != "sm_90" and _OTHER_HEAD_DIMS.match(case.name)
        if not another and (case.arch in ("sm_90", "gfx942") or case.tensor_cores or not alike):
            yield case
