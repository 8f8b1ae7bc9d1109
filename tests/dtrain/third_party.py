"""Tiny models of other libraries with random weights, inputs for them, and their loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, object]]
BATCH = 2


def dit(width: int = 8) -> Made:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=width, in_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    step = torch.arange(BATCH)
    return model.eval(), {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "timestep": step,
        "class_labels": step,
    }


def wan(width: int = 12, image: bool = False) -> Made:
    from diffusers import WanTransformer3DModel

    added = {"image_dim": 8, "added_kv_proj_dim": 2 * width} if image else {}
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=width, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, **added,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 2, 4, 6),
        "timestep": torch.arange(BATCH) * 10,
        "encoder_hidden_states": torch.randn(BATCH, 512 if image else 6, 16),
    }
    return model, inputs | ({"encoder_hidden_states_image": torch.randn(BATCH, 5, 8)} if image else {})


def wan_image() -> Made:
    return wan(image=True)


def cogvideox() -> Made:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=2, sample_width=6, sample_height=4, sample_frames=5,
        max_text_seq_length=7, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = torch.randn(2 * 2 * 3, 16)
    return model, {
        "hidden_states": torch.randn(BATCH, 2, 4, 4, 6),
        "encoder_hidden_states": torch.randn(BATCH, 7, 12),
        "timestep": torch.arange(BATCH) * 10,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def hunyuan_video(lengths: tuple[int, ...] = (3, 7)) -> Made:
    """`lengths`: text tokens of each sample that are no padding, of 7."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    batch = len(lengths)
    return model, {
        "hidden_states": torch.randn(batch, 4, 2, 4, 6),
        "timestep": torch.arange(batch) * 10,
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor(lengths)[:, None]).long(),
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def pixart() -> Made:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        norm_num_groups=1, cross_attention_dim=16, sample_size=8, caption_channels=12,
        use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": torch.randn(BATCH, 7, 12),
        "timestep": torch.arange(BATCH),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[4], [7]])).long(),
    }


class Packed(nn.Module):
    """timm's attention of before its fused form: softmax by hand."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool = False, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity() for _ in "qk"
        )
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(0.0)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale) @ k.transpose(-2, -1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = self.scores(self.q_norm(q), self.k_norm(k))
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        out = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, width)))


class Fused(Packed):
    """timm's attention of today: fused by a flag."""

    fused_attn = True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.fused_attn:
            return super().forward(x, mask)
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k, drop = self.q_norm(q), self.k_norm(k), self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, width)))


def stack(make: Callable[[], nn.Module], width: int = 24) -> Made:
    return nn.Sequential(make(), make()), {"input": torch.randn(BATCH, 9, width)}


def packed() -> Made:
    return stack(lambda: Packed(24, 2, qk_norm=True))


def fused() -> Made:
    return stack(lambda: Fused(24, 2))


def filled(make: Callable[[], Made]) -> Made:
    """The model with all its parameters drawn: zeros at the start would hide what is behind them."""
    torch.manual_seed(0)
    model, inputs = make()
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.2)
    return model, inputs


def loss(model: nn.Module, inputs: dict) -> Tensor:
    out = model(**inputs)
    out = out if isinstance(out, Tensor) else out.sample
    return F.mse_loss(out, torch.ones_like(out))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, other: nn.Module, inputs: dict) -> None:
    """Losses and all gradients are equal; distances are measured against the whole gradient."""
    losses = [loss(net, inputs) for net in (model, other)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    sum(losses).backward()
    wanted, found = gradients(model), gradients(other)
    assert wanted.keys() == found.keys()
    size = torch.nn.utils.get_total_norm(wanted.values())
    assert size > 1e-2
    worst = max(float((wanted[name] - found[name]).norm() / size) for name in wanted)
    assert worst < 1e-6
