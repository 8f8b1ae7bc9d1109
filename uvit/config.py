"""What a model is: its sizes and options, and the presets as data.

The presets with a data set's name are the models of Bao et al. (arXiv 2209.12152) and UniDiffuser
(arXiv 2303.06555). Our own `video_*` presets use the four official bodies for 65-frame, 256 × 256 clips in
the latents of a 4×8×8 autoencoder: 17 × 32 × 32 in 16 channels, 4,352 patches of (1, 2, 2), 77 text tokens,
with QK-norm and rotary positions, which long sequences and other lengths need.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Grid = tuple[int, int, int]


def patch_grid(size: Grid, patch_size: Grid) -> Grid:
    """Patches along (time, height, width).

    Raises:
        ValueError: where a patch does not divide its side.
    """
    if any(side < 1 or side % patch for side, patch in zip(size, patch_size, strict=True)):
        fits = tuple(
            max(1, round(side / patch)) * patch for side, patch in zip(size, patch_size, strict=True)
        )
        raise ValueError(
            f"(frames, height, width) = {tuple(size)}: not divisible by patch_size = {patch_size}; "
            f"{fits} would be"
        )
    frames, height, width = (side // patch for side, patch in zip(size, patch_size, strict=True))
    return frames, height, width


def _check_body(width: int, depth: int, heads: int, mlp_ratio: float) -> None:
    if width < 2 or width % 2:
        raise ValueError(
            f"width = {width}: must be even and positive, for the sine and cosine of the time token"
        )
    if heads < 1 or width % heads:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - heads))
        raise ValueError(f"heads = {heads}: does not divide width = {width}; heads = {nearest} would")
    if depth < 2 or depth % 2:
        raise ValueError(
            f"depth = {depth}: must be even and positive: half in, half out; the mid block comes on top"
        )
    if mlp_ratio <= 0:
        raise ValueError(f"mlp_ratio = {mlp_ratio}: must be positive; 4.0 is usual")


def _check_window(window: Grid, tile: Grid) -> None:
    if min(tile) < 1:
        raise ValueError(f"window_tile = {tile}: every side must be positive")
    if any(side < 0 or side % step for side, step in zip(window, tile, strict=True)):
        fits = tuple(max(1, round(side / step)) * step for side, step in zip(window, tile, strict=True))
        raise ValueError(
            f"window = {window}: not a multiple of window_tile = {tile}; {fits} would be; 0 is all of an axis"
        )


@dataclass(frozen=True)
class UViTConfig:
    """A U-ViT for images or video; an image is a one-frame video."""

    input_size: Grid = field(
        default=(1, 32, 32),
        metadata={"help": "native (frames, height, width) of the pixels or latents; other sizes run too"},
    )
    patch_size: Grid = field(
        default=(1, 2, 2), metadata={"help": "(frames, height, width) of the patch that makes one token"}
    )
    in_channels: int = field(default=4, metadata={"help": "channels of the pixels (3) or latents"})
    width: int = field(default=512, metadata={"help": "features of a token"})
    depth: int = field(
        default=12, metadata={"help": "in blocks + out blocks, even; there is one mid block besides"}
    )
    heads: int = field(default=8, metadata={"help": "attention heads; must divide width"})
    mlp_ratio: float = field(default=4.0, metadata={"help": "hidden features of a block's MLP, per width"})
    qkv_bias: bool = field(default=False, metadata={"help": "bias in the query, key and value projection"})
    qk_norm: bool = field(
        default=False, metadata={"help": "RMSNorm on queries and keys: keeps long sequences stable in bf16"}
    )
    positions: Literal["learned", "rope"] = field(
        default="learned",
        metadata={"help": "a learned table, interpolated at other sizes, or 3-axis rotary, which extends"},
    )
    window: Grid = field(
        default=(0, 0, 0),
        metadata={
            "help": "patches along (time, height, width) that a patch sees around it, multiples of "
            "window_tile; 0 is all of that axis; attention then costs what it sees (on a GPU)"
        },
    )
    window_tile: Grid = field(
        default=(4, 8, 4),
        metadata={
            "help": "patches along (time, height, width) that share one window; 64 of them, or a multiple of "
            "128, fill the kernels' blocks"
        },
    )
    condition: Literal["none", "class", "text"] = field(
        default="none", metadata={"help": "what the model is told besides the time"}
    )
    num_classes: int = field(
        default=0, metadata={"help": "labels for condition = 'class', counting the null label of guidance"}
    )
    text_dim: int = field(default=768, metadata={"help": "features of a text token, for condition = 'text'"})
    text_tokens: int = field(default=77, metadata={"help": "text tokens of a sample, for condition = 'text'"})
    time_embed: bool = field(
        default=False, metadata={"help": "pass the time token through an MLP of width D, 4D, D"}
    )
    final_conv: bool = field(
        default=True, metadata={"help": "3×3 convolution per frame at the end; smooths patch borders"}
    )
    long_skips: bool = field(
        default=True, metadata={"help": "join in block i with out block -i; False is an ablation"}
    )

    def __post_init__(self) -> None:
        _check_body(self.width, self.depth, self.heads, self.mlp_ratio)
        for name in ("in_channels", *(("text_dim", "text_tokens") if self.condition == "text" else ())):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be positive")
        if min(self.patch_size) < 1:
            raise ValueError(f"patch_size = {self.patch_size}: every side must be positive")
        _check_window(self.window, self.window_tile)
        try:
            patch_grid(self.input_size, self.patch_size)
        except ValueError as error:
            raise ValueError(f"input_size = {self.input_size}: {error}") from None
        if self.condition == "class" and self.num_classes < 1:
            raise ValueError(f"num_classes = {self.num_classes}: condition = 'class' needs at least 1")
        if self.positions == "rope" and (self.head_dim % 2 or self.head_dim < 6):
            raise ValueError(
                f"heads = {self.heads}: positions = 'rope' needs width / heads even and at least 6 "
                f"(a pair for each axis), not {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.width // self.heads

    @property
    def grid(self) -> Grid:
        """Patches along (time, height, width) at the native size."""
        return patch_grid(self.input_size, self.patch_size)

    @property
    def extra_tokens(self) -> int:
        """Tokens ahead of the patches: time, and the label or the text."""
        return 1 + {"none": 0, "class": 1, "text": self.text_tokens}[self.condition]

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        frames, height, width = self.patch_size
        return frames * height * width * self.in_channels

    @staticmethod
    def presets() -> dict[str, "UViTConfig"]:
        """Configurations by name; see the module's docstring."""
        return presets()


@dataclass(frozen=True)
class UniDiffuserConfig:
    """UniDiffuser: one post-norm U-ViT over image latents, a CLIP image embedding and text."""

    input_size: tuple[int, int] = field(
        default=(64, 64), metadata={"help": "native (height, width) of the latents; other sizes run too"}
    )
    patch_size: int = field(default=2, metadata={"help": "side of the square patch that makes one token"})
    in_channels: int = field(default=4, metadata={"help": "channels of the latents"})
    width: int = field(default=1536, metadata={"help": "features of a token"})
    depth: int = field(
        default=30, metadata={"help": "in blocks + out blocks, even; there is one mid block besides"}
    )
    heads: int = field(default=24, metadata={"help": "attention heads; must divide width"})
    mlp_ratio: float = field(default=4.0, metadata={"help": "hidden features of a block's MLP, per width"})
    qkv_bias: bool = field(default=False, metadata={"help": "bias in the query, key and value projection"})
    time_embed: bool = field(
        default=False, metadata={"help": "pass each time token through its own MLP of width D, 4D, D"}
    )
    text_dim: int = field(default=64, metadata={"help": "features of a text token"})
    text_tokens: int = field(default=77, metadata={"help": "text tokens of a sample"})
    clip_dim: int = field(default=512, metadata={"help": "features of the CLIP image embedding"})
    data_type_token: bool = field(
        default=False,
        metadata={"help": "version 1: a token that says which of two data sources a sample has"},
    )

    def __post_init__(self) -> None:
        _check_body(self.width, self.depth, self.heads, self.mlp_ratio)
        for name in ("in_channels", "patch_size", "text_dim", "text_tokens", "clip_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be positive")
        try:
            patch_grid((1, *self.input_size), (1, self.patch_size, self.patch_size))
        except ValueError as error:
            raise ValueError(f"input_size = {self.input_size}: {error}") from None

    @property
    def grid(self) -> Grid:
        """Patches along (time, height, width) at the native size; time is 1."""
        return patch_grid((1, *self.input_size), (1, self.patch_size, self.patch_size))

    @staticmethod
    def presets() -> dict[str, "UniDiffuserConfig"]:
        """The two published versions."""
        return {
            "unidiffuser_v0": UniDiffuserConfig(),
            "unidiffuser_v1": UniDiffuserConfig(data_type_token=True),
        }


_S: Mapping[str, Any] = {"width": 512, "depth": 12, "heads": 8}
_M: Mapping[str, Any] = {"width": 768, "depth": 16, "heads": 12}
_L: Mapping[str, Any] = {"width": 1024, "depth": 20, "heads": 16}
_H: Mapping[str, Any] = {"width": 1152, "depth": 28, "heads": 16}
_NULL_LABEL: Mapping[str, Any] = {"condition": "class", "num_classes": 1001}


def _image(size: int, patch: int, channels: int, *parts: Mapping[str, Any]) -> UViTConfig:
    options = {name: value for part in parts for name, value in part.items()}
    return UViTConfig((1, size, size), (1, patch, patch), channels, **options)


def _video(body: Mapping[str, Any]) -> UViTConfig:
    return UViTConfig(
        input_size=(17, 32, 32),
        patch_size=(1, 2, 2),
        in_channels=16,
        qk_norm=True,
        positions="rope",
        condition="text",
        final_conv=False,
        **body,
    )


def presets() -> dict[str, UViTConfig]:
    """U-ViT configurations by name; see the module's docstring."""
    labels = {"condition": "class", "num_classes": 1000}
    return {
        "cifar10_s2": _image(32, 2, 3, _S),
        "celeba64_s4": _image(64, 4, 3, _S),
        "imagenet64_m4": _image(64, 4, 3, _M, labels),
        "imagenet64_l4": _image(64, 4, 3, _L, labels),
        "imagenet256_l2": _image(32, 2, 4, _L, _NULL_LABEL),
        "imagenet256_h2": _image(32, 2, 4, _H, _NULL_LABEL, {"final_conv": False}),
        "imagenet512_l4": _image(64, 4, 4, _L, _NULL_LABEL),
        "imagenet512_h4": _image(64, 4, 4, _H, _NULL_LABEL, {"final_conv": False}),
        "mscoco_s2": _image(32, 2, 4, _S, {"condition": "text"}),
        "mscoco_s2_deep": _image(32, 2, 4, _S, {"condition": "text", "depth": 16}),
        "video_s2": _video(_S),
        "video_m2": _video(_M),
        "video_l2": _video(_L),
        "video_h2": _video(_H),
    }
