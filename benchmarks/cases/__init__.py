"""One file, one case: a module that defines `CASE` is found by `benchmarks.case.discover`."""
