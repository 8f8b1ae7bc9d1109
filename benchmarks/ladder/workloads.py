"""What is trained: image and video U-ViTs, and DiT-XL/2, each with the samples that a GPU has of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from uvit import UViTConfig

__all__ = ["WORKLOADS", "Workload", "tiny"]

_CLASSES = 1001


@dataclass(frozen=True)
class Workload:
    """One model at one size.

    Attributes:
        name: for the command line.
        title: for people.
        model: of `benchmarks.ladder.recipe`.
        samples: of a GPU and step, in one micro-batch.
        kind: which model; a DiT is plain on every rung, and dtrain swaps its layers.
    """

    name: str
    title: str
    model: UViTConfig
    samples: int = 1
    kind: Literal["uvit", "dit"] = "uvit"


def tiny(workload: Workload) -> Workload:
    """The same kind of model with heads as wide, for gates and rehearsals: seconds on a CPU."""
    model = workload.model
    frames = min(2, model.input_size[0])
    small = replace(
        model,
        input_size=(frames, 16, 16),
        width=2 * model.width // model.heads,
        heads=2,
        depth=4,
        num_classes=5,
    )
    return Workload(workload.name, f"{workload.title}; tiny", small, 2, workload.kind)


def _image(name: str, title: str, samples: int, kind: Literal["uvit", "dit"], conv: bool) -> Workload:
    """The size of U-ViT-H/2 and of DiT-XL/2, on 32 x 32 latents: 256 patches."""
    return Workload(name, title, _model(width=1152, depth=28, heads=16, final_conv=conv), samples, kind)


def _videos() -> Iterator[Workload]:
    """Latents of 16 channels in patches of 1 x 2 x 2."""
    # name, width, depth, heads
    sizes = [("0.5b", 1152, 28, 16), ("1b", 1536, 30, 24), ("2b", 2048, 36, 16)]
    # name, latents: patches of time, height, width
    lengths = [("8k", (8, 64, 64)), ("33k", (32, 64, 64)), ("131k", (32, 128, 128))]
    for size, width, depth, heads in sizes:
        for length, clip in lengths:
            body = _model(width=width, depth=depth, heads=heads, final_conv=False)
            model = replace(body, input_size=clip, in_channels=16)
            yield Workload(f"{size}-{length}", f"video U-ViT {size.upper()}, {length} tokens", model)


def _model(width: int, depth: int, heads: int, final_conv: bool) -> UViTConfig:
    return UViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        condition="class",
        num_classes=_CLASSES,
        final_conv=final_conv,
    )


WORKLOADS = {
    workload.name: workload
    for workload in [
        _image("h2", "U-ViT-H/2, 256² images, 128 a GPU", 128, "uvit", conv=True),
        _image("xl2", "DiT-XL/2, 256² images, 128 a GPU", 128, "dit", conv=False),
        *_videos(),
    ]
}
