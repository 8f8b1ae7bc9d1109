"""The ops around attention, the optimizer, a block and a training step, each against PyTorch's best."""
