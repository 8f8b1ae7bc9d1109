"""Attention modules of timm's form that compute softmax by hand, as the original DiT's with older timm.

x ← proj(norm(softmax(scale·q·kᵀ)·v)), with q, k, v = qkv(x) packed in the order (3, H, D) and optional norms
of q and k (https://github.com/huggingface/pytorch-image-models, timm/layers/attention.py). They are found by
their parts; that they compute just this is shown by a probe on random weights before one of them is touched.

Shapes: B batch, N tokens, C width, H heads, D width of a head.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.kernels.attention import Backend, attention

_PARTS = {"qkv", "proj", "q_norm", "k_norm", "norm", "attn_drop", "proj_drop"}


def is_packed(module: nn.Module) -> bool:
    """Whether a module has what timm's attention has: `qkv` and `proj`, both linear, and `num_heads`."""
    qkv, proj, heads = (getattr(module, name, None) for name in ("qkv", "proj", "num_heads"))
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int)):
        return False
    return qkv.out_features % (3 * heads) == 0


def refusal(module: nn.Module) -> str:
    """Why a packed module cannot be replaced; empty when it can."""
    foreign = {name for name, _ in module.named_children()} - _PARTS
    foreign |= {name for name, _ in module.named_parameters(recurse=False)}
    foreign |= {name for name, _ in module.named_buffers(recurse=False)}
    if foreign:
        return f"{', '.join(sorted(foreign))} may change what it computes"
    if getattr(getattr(module, "attn_drop", None), "p", 0.0) > 0:
        return "dropout of attention weights"
    return _probe(module)


def forward_of(cls: type[nn.Module], backend: Backend, note: Callable[[str], None]) -> Callable[..., Any]:
    """A `forward` for modules of a class for which `refusal` is empty.

    Args:
        cls: its own `forward` serves calls with more than tokens.
        backend: as `kernels.attention.attention` takes it.
        note: is told why a call goes to the original `forward`.
    """

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(value is not None and value is not False for value in (*args, *kwargs.values())):
            note("arguments beyond the tokens, such as a mask")
            return cls.forward(self, x, *args, **kwargs)
        return _forward(self, x, backend)

    return forward


def _forward(module: Any, x: Tensor, backend: Backend) -> Tensor:
    qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, -1))  # (B, N, 3, H, D)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D): views
    q, k = _maybe(module, "q_norm", q), _maybe(module, "k_norm", k)
    out = attention(q, k, v, scale=getattr(module, "scale", None), backend=backend)
    out = _maybe(module, "norm", out.transpose(1, 2).flatten(2))  # (B, N, H·D)
    return _maybe(module, "proj_drop", module.proj(out))


def _maybe(module: nn.Module, name: str, x: Tensor) -> Tensor:
    part = getattr(module, name, None)
    return x if part is None else part(x)


def _probe(module: nn.Module) -> str:
    """Run a copy with random weights both ways; what differs, or empty."""
    draws = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        twin: Any = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        for weight in twin.parameters():
            weight.normal_(std=weight.shape[1] ** -0.5 if weight.dim() > 1 else 1.0, generator=draws)
        x = torch.randn(2, 6, twin.qkv.in_features, generator=draws)
        try:
            wanted = twin(x)
        except Exception as error:  # whatever a third party's code raises: it is not the form we know
            return f"called with tokens alone it raises {type(error).__name__}"
        found = _forward(twin, x, "reference")
    same = wanted.shape == found.shape and torch.allclose(wanted, found, rtol=1e-4, atol=1e-4)
    return "" if same else "it computes something else than its parts suggest"
