"""What a run does about faults while it runs; those of the disk are `dtrain.checkpoint`'s."""
