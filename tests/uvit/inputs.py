"""Inputs of a U-ViT, whatever it is conditioned on."""

import torch
from torch import Tensor

import uvit
from uvit.config import Grid


def draw_inputs(config: uvit.UViTConfig, size: Grid = (4, 8, 8), batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {"x": draw(batch, config.in_channels, *size), "timesteps": torch.linspace(3.0, 900.0, batch)}
    if config.condition == "class":
        inputs["y"] = torch.arange(batch) % config.num_classes
    if config.condition == "text":
        inputs["context"] = draw(batch, config.text_tokens, config.text_dim)
    return inputs
