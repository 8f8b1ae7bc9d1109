"""How weights and averages are kept: in fp32, or in bf16 without a copy in fp32.

Bytes of a parameter that trains, all of them cut over the shard axis:

    weights  gradient  moments        average   sum
    fp32 4      4      fp32 8         fp32 4     20
    fp32 4      4      8bit 2 + 1/32  fp32 4     14.03
    bf16 2      2      8bit 2 + 1/32  bf16 2      8.03

An update is far below the distance of neighbouring bf16 numbers, 2^-8 of a weight, so that rounding to
nearest would return the old weight, for ever. Rounding by chance is right in mean (Gupta et al., "Deep
Learning with Limited Numerical Precision", arXiv 1502.02551); it costs noise, see `dtrain.optim.ema`.
"""

import logging
from typing import Literal

import torch
from torch import nn

log = logging.getLogger(__name__)

__all__ = ["DTYPES", "Precision", "convert_weights"]

Precision = Literal["fp32", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert_weights(model: nn.Module, weights: Precision) -> nn.Module:
    """Give all floating parameters one dtype, in place; frozen ones too, as FSDP2 wants of a unit.

    Call it before `fully_shard`, best on meta: parameters that are filled afterwards are rounded to nearest,
    from the same numbers on every mesh. Buffers stay as they are. Compute has a dtype of its own,
    `shard.param_dtype`.

    Raises:
        ValueError: of an unknown name.
    """
    if weights not in DTYPES:
        raise ValueError(f'optim.weights = {weights!r}: must be "fp32" or "bf16"')
    odd = 0
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != DTYPES[weights]:
            odd += parameter.dtype != torch.float32
            parameter.data = parameter.data.to(DTYPES[weights])
    if odd:
        log.warning('optim.weights = "%s": %d parameters that the model builds otherwise', weights, odd)
    return model
