"""Measurements of what each technique gains: `python -m benchmarks --help`, docs/benchmarks.md."""
