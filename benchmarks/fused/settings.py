"""How large the fused ops are: those of U-ViT-H/2 on images and of a wider model on video; tiny on a CPU."""

from dataclasses import dataclass, replace

import torch

from benchmarks.sweep import plan
from benchmarks.sweep.plan import Kind
from uvit import UViTConfig, presets

__all__ = ["Settings", "Size", "settings_for"]


@dataclass(frozen=True)
class Size:
    """Activations of a transformer: (samples, tokens, width), attended in heads."""

    samples: int
    tokens: int
    width: int
    heads: int

    @property
    def rows(self) -> int:
        return self.samples * self.tokens

    @property
    def label(self) -> str:
        """As in names of cases."""
        return f"d{self.width}"

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.samples} × {self.tokens:,} tokens of {self.width}"


@dataclass(frozen=True, kw_only=True)
class Settings(plan.Settings):
    """Sizes of a run.

    Args:
        images, video: activations.
        quick: fewer cases.
        quantised: elements that are quantised.
        model: that is trained, and whose shards the optimizer gets.
        shards: ranks that its parameters are divided over.
        batch: images of a training step.
        gate_batch: images that its gradients are checked on.
    """

    images: Size
    video: Size
    quick: bool
    quantised: int
    model: UViTConfig
    shards: int
    batch: int
    gate_batch: int


def settings_for(kind: Kind, quick: bool) -> Settings:
    """CPU sizes rehearse the code in Triton's interpreter; their times mean nothing."""
    model = presets()["imagenet256_h2"]
    if kind == "cpu":
        return Settings(
            kind="cpu",
            dtype=torch.float16,  # bf16 is wrong in the interpreter
            rounds=1,
            warmup=0,
            images=Size(2, 9, 64, 2),
            video=Size(1, 20, 96, 2),
            quick=quick,
            quantised=2**12 + 40,
            model=replace(model, input_size=(1, 8, 8), width=64, depth=2, heads=2, num_classes=11),
            shards=8,
            batch=2,
            gate_batch=1,
        )
    return Settings(
        kind="cuda",
        dtype=torch.bfloat16,
        rounds=7 if quick else 11,
        images=Size(128, 258, 1152, 16),
        video=Size(1, 32768, 2048, 16),
        quick=quick,
        quantised=2**26,
        model=model,
        shards=8,
        batch=128,
        gate_batch=8,
    )
