"""Making a model by preset name or configuration."""

import dataclasses
import difflib
from typing import Any

import torch
from torch import nn

from uvit.config import UniDiffuserConfig, UViTConfig, presets
from uvit.model import UViT, init_parameters
from uvit.unidiffuser import UniDiffuser


def build(preset_or_config: str | UViTConfig | UniDiffuserConfig, **overrides: Any) -> nn.Module:
    """Make a model on the default device and initialise it; under torch.device("meta") only make it.

    Args:
        preset_or_config: a name out of `presets()`, "unidiffuser_v0", "unidiffuser_v1", or a configuration.
        overrides: fields of the configuration to replace.
    Returns: a `UViT` or a `UniDiffuser`, drawn from PyTorch's global generator (torch.manual_seed).
    Raises:
        ValueError: an unknown name or field, or fields that do not fit each other.
    """
    config = _preset(preset_or_config) if isinstance(preset_or_config, str) else preset_or_config
    fields = [f.name for f in dataclasses.fields(config)]
    for name in overrides:
        if name not in fields:
            raise ValueError(f"{name}: no field of {type(config).__name__}; {_nearest(name, fields)}")
    config = dataclasses.replace(config, **overrides)
    device = torch.get_default_device()
    # Made on the meta device first: the layers' own initialisation would cost time and random numbers.
    with torch.device("meta"):
        model = UViT(config) if isinstance(config, UViTConfig) else UniDiffuser(config)
    if device.type != "meta":
        init_parameters(model.to_empty(device=device))
    return model


def _preset(name: str) -> UViTConfig | UniDiffuserConfig:
    known = presets() | UniDiffuserConfig.presets()
    if name not in known:
        raise ValueError(f"preset = {name!r}: no such preset; {_nearest(name, list(known))}")
    return known[name]


def _nearest(name: str, known: list[str]) -> str:
    return "nearest: " + ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
