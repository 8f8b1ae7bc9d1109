"""U-ViT and UniDiffuser: the models, their presets and their official weights."""

from uvit import weights
from uvit.config import UniDiffuserConfig, UViTConfig, presets
from uvit.factory import build
from uvit.model import UViT, forward_flops, init_parameters, initializer, token_count
from uvit.unidiffuser import UniDiffuser

__all__ = [
    "UViT",
    "UViTConfig",
    "UniDiffuser",
    "UniDiffuserConfig",
    "build",
    "forward_flops",
    "init_parameters",
    "initializer",
    "presets",
    "token_count",
    "weights",
]
