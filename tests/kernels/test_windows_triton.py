"""A U-ViT that attends in windows by the Triton kernels is the one that writes its mask out."""

import torch
from torch import Tensor, nn

import uvit
from uvit.layers import Attention


def _evaluate(model: nn.Module, backend: str) -> tuple[Tensor, list[Tensor]]:
    for module in model.modules():
        if isinstance(module, Attention):
            module.attention_backend = backend  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    out = model(torch.randn(1, 4, 2, 5, 7, generator=generator), torch.tensor([300.0]))
    return out, list(torch.autograd.grad(out.sin().sum(), list(model.parameters())))


def test_kernels_and_reference_agree_on_a_ragged_grid() -> None:
    torch.manual_seed(0)
    model = uvit.build(
        uvit.UViTConfig((2, 5, 7), (1, 1, 1), width=32, depth=2, heads=1, positions="rope", qk_norm=True),
        window=(1, 4, 4),
        window_tile=(1, 4, 4),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.testing.assert_close(
        _evaluate(model, "triton"), _evaluate(model, "reference"), rtol=1e-3, atol=1e-4
    )
