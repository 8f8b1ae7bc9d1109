"""What compressed communication does to the loss: `python -m benchmarks.accuracy --help`."""
