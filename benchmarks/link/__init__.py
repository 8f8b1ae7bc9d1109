"""Training between hosts over a limited network, all on one machine: what compression gains there."""
