"""Compressed collectives on many GPUs: a model of the time of a step, and what of it lies beside compute."""
