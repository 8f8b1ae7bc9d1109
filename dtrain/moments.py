"""Moments that a checkpoint holds in eight bits where fp32 is kept: of parameters of one row.

Earlier versions kept codes of those as well; `dtrain.adamw.has_codes` says who has them. Every rank reads all
of the codes, a byte an element, and keeps its part of what they stand for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtrain.init import copy_full
from dtrain.kernels.adamw_reference import BLOCK, decode_first, decode_second

__all__ = ["room_for_codes", "take_codes"]

_DECODE = {"exp_avg": decode_first, "exp_avg_sq": decode_second}


def room_for_codes(state: Mapping[str, Tensor], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole tensors to load a parameter's codes into; empty where the checkpoint has what `state` has.

    Args:
        state: the parameter's, as it is kept.
        saved: metadata of its tensors in the checkpoint.
    """
    if "exp_avg" not in state or "exp_avg_codes" not in saved:
        return {}
    return {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in saved.items()}


def take_codes(state: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Write what the codes of one parameter stand for to its state, in place."""
    state["step"].copy_(loaded["step"])
    for name, decode in _DECODE.items():
        codes, scales = loaded[f"{name}_codes"], loaded[f"{name}_scale"]
        rows = codes.reshape(len(scales), -1)
        blocks = torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).view(len(rows), -1, BLOCK)
        whole = decode(blocks, scales).flatten(1)[:, : rows.shape[1]]
        copy_full(state[name], whole.reshape(codes.shape))
