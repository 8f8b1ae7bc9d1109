"""Official weights in and out, and image weights as the start of a video model.

The models of this package use the official state keys, so loading is a check and a copy. Sources of the
constructors and keys: github.com/baofff/U-ViT and github.com/thu-ml/unidiffuser.

Shapes: D width, C channels, L tokens, pt frames of a patch, p side of a patch.
"""

import difflib
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uvit.config import Grid, UniDiffuserConfig, UViTConfig
from uvit.embed import fit_positions
from uvit.factory import build
from uvit.model import UViT
from uvit.unidiffuser import UniDiffuser

_log = logging.getLogger(__name__)

_REQUIRED = object()
_BODY = {
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": False,
    "mlp_time_embed": False,
}
_PINNED = {"qk_scale": None, "norm_layer": nn.LayerNorm}
_UVIT = {
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "conv": True,
    "skip": True,
    "use_checkpoint": False,
}
_UNIDIFFUSER = dict.fromkeys(
    ["img_size", "in_chans", "patch_size", "text_dim", "num_text_tokens", "clip_img_dim"], _REQUIRED
) | {"use_checkpoint": False}
_DROPOUT = {"pos_drop_rate": 0.0, "drop_rate": 0.0, "attn_drop_rate": 0.0}

# Arguments of the official constructors with their defaults; then those that only work with the default.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "uvit": _BODY | _UVIT | {"num_classes": -1},
    "uvit_t2i": _BODY | _UVIT | {"clip_dim": 768, "num_clip_token": 77},
    "unidiffuser": _BODY | _UNIDIFFUSER,
    "unidiffuser_v1": _BODY | _UNIDIFFUSER,
}
_ONLY_DEFAULT: dict[str, dict[str, Any]] = {
    kind: _PINNED | (_DROPOUT if kind.startswith("unidiffuser") else {}) for kind in _ARGUMENTS
}


def from_official_config(kind: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Make the model that an official constructor would make; its forward takes the official argument names.

    Args:
        kind: "uvit", "uvit_t2i" (libs.uvit, libs.uvit_t2i), "unidiffuser" or "unidiffuser_v1"
            (libs.uvit_multi_post_ln, libs.uvit_multi_post_ln_v1).
        kwargs: that constructor's arguments. `use_checkpoint` is the trainer's business and passed over.
    Raises:
        ValueError: an unknown kind or argument, or one that no published model uses (dropout, qk_scale).
    """
    if kind not in _ARGUMENTS:
        raise ValueError(f"kind = {kind!r}: no official model; must be one of {', '.join(_ARGUMENTS)}")
    a = _official_arguments(kind, kwargs)
    if a["use_checkpoint"]:
        _log.info("use_checkpoint is passed over: activation checkpointing is an option of the training run")
    body = {
        "in_channels": a["in_chans"],
        "width": a["embed_dim"],
        "depth": a["depth"] // 2 * 2,  # the official code rounds depth/2 down and adds the mid block
        "heads": a["num_heads"],
        "mlp_ratio": a["mlp_ratio"],
        "qkv_bias": a["qkv_bias"],
        "time_embed": a["mlp_time_embed"],
    }
    return build(_unidiffuser(kind, a, body) if kind.startswith("unidiffuser") else _uvit(a, body))


def _official_arguments(kind: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    known, only_default = _ARGUMENTS[kind], _ONLY_DEFAULT[kind]
    for name, value in kwargs.items():
        if name not in known | only_default:
            nearest = difflib.get_close_matches(name, [*known, *only_default], n=1, cutoff=0.0)[0]
            raise ValueError(f"{name}: no argument of the official {kind}; nearest: {nearest}")
        if name in only_default and value != only_default[name]:
            raise ValueError(
                f"{name} = {value}: only the official default, {only_default[name]}, is supported"
            )
    arguments = known | dict(kwargs)
    missing = [name for name, value in arguments.items() if value is _REQUIRED]
    if missing:
        raise ValueError(f"{', '.join(missing)}: the official {kind} has no default for it; give a value")
    return arguments


def _uvit(a: Mapping[str, Any], body: Mapping[str, Any]) -> UViTConfig:
    options: dict[str, Any] = {}
    if "clip_dim" in a:
        options = {"condition": "text", "text_dim": a["clip_dim"], "text_tokens": a["num_clip_token"]}
    elif a["num_classes"] > 0:
        options = {"condition": "class", "num_classes": a["num_classes"]}
    return UViTConfig(
        input_size=(1, a["img_size"], a["img_size"]),
        patch_size=(1, a["patch_size"], a["patch_size"]),
        final_conv=a["conv"],
        long_skips=a["skip"],
        **body,
        **options,
    )


def _unidiffuser(kind: str, a: Mapping[str, Any], body: Mapping[str, Any]) -> UniDiffuserConfig:
    size = a["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return UniDiffuserConfig(
        input_size=(height, width),
        patch_size=a["patch_size"],
        text_dim=a["text_dim"],
        text_tokens=a["num_text_tokens"],
        clip_dim=a["clip_img_dim"],
        data_type_token=kind == "unidiffuser_v1",
        **body,
    )


def load_official(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy an official state dict into an unsharded model of this package; a meta model moves to the CPU.

    Raises:
        ValueError: keys that are missing, unexpected or of another shape, by name.
    """
    own = model.state_dict()
    misshaped = [
        f"{key} is {tuple(state_dict[key].shape)}, must be {tuple(own[key].shape)}"
        for key in own.keys() & state_dict.keys()
        if state_dict[key].shape != own[key].shape
    ]
    problems = {
        "missing": sorted(own.keys() - state_dict.keys()),
        "unexpected": sorted(state_dict.keys() - own.keys()),
        "of another shape": sorted(misshaped),
    }
    if any(problems.values()):
        told = "; ".join(
            f"{len(found)} {what}: {', '.join(found)}" for what, found in problems.items() if found
        )
        raise ValueError(f"the state dict does not fit {type(model).__name__}: {told}")
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device="cpu")
    model.load_state_dict(state_dict)


def export_official(model: nn.Module) -> dict[str, Tensor]:
    """An official state dict of an unsharded model: fresh tensors on the CPU, in the model's dtype.

    Raises:
        ValueError: a model that the official code cannot express.
    """
    if isinstance(model, UViT):
        c = model.config
        ours = {
            f"qk_norm = {c.qk_norm}": c.qk_norm,
            f"positions = {c.positions!r}": c.positions != "learned",
            f"input_size = {c.input_size}": c.input_size[0] != 1 or c.input_size[1] != c.input_size[2],
            f"patch_size = {c.patch_size}": c.patch_size[0] != 1 or c.patch_size[1] != c.patch_size[2],
        }
        named = [name for name, is_ours in ours.items() if is_ours]
        if named:
            raise ValueError(
                f"{', '.join(named)}: the official U-ViT has no such option; only square images export"
            )
    elif not isinstance(model, UniDiffuser):
        raise ValueError(f"{type(model).__name__}: has no official form; only UViT and UniDiffuser do")
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def inflate_image_weights(state_dict: Mapping[str, Tensor], video_config: UViTConfig) -> dict[str, Tensor]:
    """Turn an image U-ViT's weights into the start of a video U-ViT's.

    The patch embedding's weight is spread evenly over the frames of a patch, the decoder's rows are repeated
    for them, the position table is repeated over time (interpolated in space where the sizes differ). A clip
    of equal frames that fills one patch in time is then treated exactly as its image.

    Args:
        state_dict: of an image model with the same condition, width, depth and spatial patch.
        video_config: of the model to start; what it has and the image lacks, or reversed, is logged.
    Returns: a state dict for `load_official(build(video_config), …)`.
    """
    out = dict(state_dict)
    frames = video_config.patch_size[0]
    if frames > 1:
        weight = out["patch_embed.proj.weight"]
        out["patch_embed.proj.weight"] = weight[:, :, None].repeat(1, 1, frames, 1, 1) / frames
        out["decoder_pred.weight"] = out["decoder_pred.weight"].repeat(frames, 1)
        out["decoder_pred.bias"] = out["decoder_pred.bias"].repeat(frames)
    if video_config.positions == "learned":
        out["pos_embed"] = _repeat_positions(out["pos_embed"], video_config)
    elif out.pop("pos_embed", None) is not None:
        _log.info("pos_embed is dropped: positions = 'rope' has no table")
    if video_config.qk_norm:
        _log.info(
            "attn.q_norm and attn.k_norm start at 1: the image model does not normalise queries and keys"
        )
        out |= _unit_norms(out, video_config.head_dim)
    return out


def _repeat_positions(table_1LD: Tensor, config: UViTConfig) -> Tensor:
    frames, height, width = config.grid
    patches = table_1LD.shape[1] - config.extra_tokens
    native: Grid = (1, height, width)
    if patches != height * width:
        side = math.isqrt(max(patches, 0))
        if side < 1 or side * side != patches:
            raise ValueError(
                f"pos_embed has {table_1LD.shape[1]} tokens: less {config.extra_tokens} extra ones for "
                f"condition = {config.condition!r}, they are no square of patches"
            )
        native = (1, side, side)
    fitted = fit_positions(table_1LD, native, (1, height, width))
    extra, spatial = fitted.split([config.extra_tokens, height * width], dim=1)
    return torch.cat([extra, spatial.repeat(1, frames, 1)], dim=1)


def _unit_norms(state_dict: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    like = next(iter(state_dict.values()))
    prefixes = [key.removesuffix("qkv.weight") for key in state_dict if key.endswith("attn.qkv.weight")]
    return {f"{p}{name}.weight": like.new_ones(head_dim) for p in prefixes for name in ("q_norm", "k_norm")}
