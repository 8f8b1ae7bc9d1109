"""What a run will hold, send and compute, before it runs."""
