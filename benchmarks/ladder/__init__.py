"""The memory ladder: what each remedy takes off the peak, `python -m benchmarks.ladder`."""
