"""The parts of a U-ViT's body: attention, MLP, the pre-norm block with its long skip, and the U they form.

Block: x ← W·[x, skip] + b in out blocks, then x ← x + attn(norm(x)), x ← x + mlp(norm(x)).
Source: Bao et al., arXiv 2209.12152, figure 1.

Shapes: B batch, N tokens, D width, H heads.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.kernels import reference
from dtrain.kernels.attention import Backend
from dtrain.kernels.attention_layer import qkv_attention
from dtrain.kernels.block_mask import BlockMask
from dtrain.kernels.mlp import mlp
from dtrain.kernels.norm import add_norm, norm
from dtrain.kernels.qk_norm_rope import qk_norm_rope
from dtrain.kernels.serving import Backend as FusedBackend
from dtrain.kernels.skip import skip_linear
from uvit.embed import PLAIN, Layout, Rope


class RMSNorm(nn.Module):
    """`kernels.reference.rms_norm` with its weight (D,)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, in one pass over memory each way, alone or with the residual sum before it.

    `fused_backend` says who computes it, see `kernels.norm`. Under autocast the result is in fp32, like
    PyTorch's, or with `before_product` in the dtype that the product behind it would cast to: a pass less.
    """

    def __init__(self, width: int, before_product: bool = True) -> None:
        super().__init__(width)
        self.fused_backend: FusedBackend = "auto"
        self.before_product = before_product

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.bias, **self._how(x))

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """x + branch, and that normed."""
        return add_norm(x, branch, self.weight, self.bias, **self._how(x))

    def _how(self, x: Tensor) -> dict[str, Any]:
        kind, dtype = x.device.type, None
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind) if self.before_product else torch.float32
        return {"eps": self.eps, "dtype": dtype, "backend": self.fused_backend}


class SkipLinear(nn.Linear):
    """Joins a block's input and its long skip; weight (D, 2D) as the official `skip_linear`."""

    def __init__(self, width: int) -> None:
        super().__init__(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        return skip_linear(x, skip, self.weight, self.bias)


class Attention(nn.Module):
    """Self-attention over all tokens, or those that a mask lets them see, (B, N, D) to (B, N, D).

    `attention_backend` says who computes it, see `kernels.attention`. `attend`, which is None, may be any
    function from q, k, v (B, H, N, D/H), normed and rotated, to (B, H, N, D/H) instead; where there is a mask
    it gets it as `mask`.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.attention_backend: Backend = "auto"
        self.attend: Callable[..., Tensor] | None = None
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = RMSNorm(width // heads) if qk_norm else None
        self.k_norm = RMSNorm(width // heads) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope | None = None, mask: BlockMask | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D/H)
        how = self._norms() | ({"cos": rope.cos, "sin": rope.sin} if rope else {})
        if self.attend is None:
            heads = qkv_attention(qkv, **how, mask=mask, backend=self.attention_backend)
        else:
            masked = {} if mask is None else {"mask": mask}
            heads = self.attend(*qk_norm_rope(qkv, **how), **masked).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(heads)
        return out

    def _norms(self) -> dict[str, Any]:
        if self.q_norm is None or self.k_norm is None:
            return {}
        return {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight, "eps": self.q_norm.eps}


class Mlp(nn.Module):
    """Linear, exact GELU, linear, see `kernels.mlp`.

    The layers' parameters are used, the layers are not called: hooks on `fc1` and `fc2` do not fire.
    `fused_backend` says who computes it. `chunks`, which is 1, may be set to compute the rows in as many
    pieces, which bounds the memory of the hidden layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fused_backend: FusedBackend = "auto"
        self.chunks = 1
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1, self.fc2
        return mlp(
            x, first.weight, first.bias, second.weight, second.bias,
            chunks=self.chunks, backend=self.fused_backend,
        )  # fmt: skip


class Block(nn.Module):
    """The repeated pre-norm block; with `skip`, an out block."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads, qkv_bias, qk_norm)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.skip_linear = SkipLinear(width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None, layout: Layout = PLAIN) -> Tensor:
        """(B, N, D) to (B, N, D); `skip` is ignored by a block without `skip_linear`."""
        if self.skip_linear is not None:
            x = self.skip_linear(x, skip)
        x, normed = self.norm2.add(x, self.attn(self.norm1(x), layout.rope, layout.mask))
        out: Tensor = x + self.mlp(normed)
        return out


def time_mlp(width: int, enabled: bool) -> nn.Module:
    """Linear D→4D, SiLU, linear 4D→D on the time token; the identity unless enabled."""
    if not enabled:
        return nn.Identity()
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


def check_shapes(wanted: Mapping[str, tuple[Tensor | None, tuple[int, ...] | None]], because: str) -> None:
    """Compare inputs with the shapes that the configuration asks for; None stands for no tensor at all.

    Raises:
        ValueError: the first input that differs, what it is, what it must be and because of which option.
    """
    for name, (given, shape) in wanted.items():
        if (None if given is None else tuple(given.shape)) != shape:
            found = "None" if given is None else f"a tensor of shape {tuple(given.shape)}"
            raise ValueError(f"{name} is {found}: {because} needs {shape}")


def run_u(
    x: Tensor,
    in_blocks: Iterable[nn.Module],
    mid_block: nn.Module,
    out_blocks: Iterable[nn.Module],
    layout: Layout = PLAIN,
) -> Tensor:
    """Down the in blocks, through the mid block, up the out blocks with the skips last-in-first-out."""
    skips = []
    for block in in_blocks:
        x = block(x, None, layout)
        skips.append(x)
    x = mid_block(x, None, layout)
    for block in out_blocks:
        x = block(x, skips.pop(), layout)
    return x
