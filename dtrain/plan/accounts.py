"""Names of what memory is held for."""

__all__ = [
    "PARAMETERS", "GRADIENTS", "OPTIMIZER", "AVERAGES", "STATE",
    "BATCH", "GATHERED", "WIRE", "BACKWARD", "WORKSPACE", "OTHER", "HOST", "activations", "is_activation",
]  # fmt: skip

PARAMETERS = "parameters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
AVERAGES = "averages"
STATE = (PARAMETERS, GRADIENTS, OPTIMIZER, AVERAGES)
BATCH = "batch"
GATHERED = "gathered parameters"
WIRE = "communication buffers"
BACKWARD = "backward and recomputation"
WORKSPACE = "inside of kernels"
OTHER = "other"
HOST = "host memory"

_FORWARD = "activations"


def activations(block: str) -> str:
    """What a block's forward allocates and keeps, or that of the rest of the model for ""."""
    return f"{_FORWARD} of {block or 'the rest'}"


def is_activation(account: str) -> bool:
    """Whether a forward allocated it."""
    return account.startswith(f"{_FORWARD} of ")
