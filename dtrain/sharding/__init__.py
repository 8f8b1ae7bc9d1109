"""Which rank holds which part of the model: the mesh, FSDP2 on it, and a rank's place in the whole."""
