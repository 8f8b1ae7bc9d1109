"""Attention on real sizes: the operation, the layer around it, and windows, each against PyTorch's best."""
