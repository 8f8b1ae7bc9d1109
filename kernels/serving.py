"""Who serves a call of an op, its kernels or PyTorch: by the caller's wish, and said where it is not met.

Attention, where PyTorch has kernels of its own to choose from, decides in `attention_choice`.
"""

import functools
import logging
from typing import Literal, get_args

import torch

from dtrain.kernels.launch import on_gpu

__all__ = ["Backend", "kernels_serve"]

_log = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "reference"]


def kernels_serve(backend: Backend, device: torch.device, refusal: str, otherwise: str) -> bool:
    """Whether the kernels serve: on a GPU that they can serve, unless "reference" is asked for.

    Args:
        backend: "triton" asks for the kernels, also in Triton's interpreter.
        refusal: why they cannot serve; empty where they can.
        otherwise: what that means, such as "norms take several passes"; said once, on a GPU.
    Raises:
        ValueError: "triton" is asked for and cannot be, or the backend is unknown.
    """
    return _serve(backend, on_gpu(device), refusal, otherwise)


@functools.cache
def _serve(backend: Backend, gpu: bool, refusal: str, otherwise: str) -> bool:
    if backend not in get_args(Backend):
        raise ValueError(f"backend = {backend!r}: must be one of 'auto', 'triton', 'reference'")
    if backend == "triton" and refusal:
        raise ValueError(f"backend = 'triton': {refusal}; backend = 'auto' finds one that serves")
    if backend == "auto" and refusal and gpu:
        _log.warning("%s: %s", otherwise, refusal)
    return backend == "triton" or (backend == "auto" and gpu and not refusal)
