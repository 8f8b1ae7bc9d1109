"""Clips as files that people can open: MP4, GIF, contact sheet; and how near a clip is to its model.

    PSNR(a, b) = 10·log10(255² / mean((a - b)²))  dB        (https://en.wikipedia.org/wiki/PSNR)

Shapes: T frames, H height, W width.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dtrain.recipe import Clip

_WATCHABLE_PX, _THUMBNAIL_PX, _CAPTION_PX = 256, 128, 240
_INK, _PALE, _PAPER = (32, 33, 36), (120, 124, 130), (255, 255, 255)


def save_clips(clips: Sequence[Clip], folder: Path) -> list[Path]:
    """Write each clip as MP4 and GIF, and all as `contact_sheet.png`; return the paths, the sheet last.

    Tiny clips are enlarged to about 256 pixels by a whole number, so that pixels stay pixels.
    """
    if not clips:
        raise ValueError("clips = []: nothing to save; ask for at least one")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, clip in enumerate(clips):
        name = f"{number:03d}_{_slug(clip.caption)}".rstrip("_")
        frames_THW3 = _enlarge(clip.frames, max(1, round(_WATCHABLE_PX / clip.frames.shape[2]))).numpy()
        paths += [folder / f"{name}.mp4", folder / f"{name}.gif"]
        _write_mp4(paths[-2], frames_THW3, clip.fps)
        _write_gif(paths[-1], frames_THW3, clip.fps)
    return [*paths, contact_sheet(clips, folder / "contact_sheet.png")]


def contact_sheet(rows: Sequence[Clip], path: Path, columns: int = 8) -> Path:
    """Draw clips as rows of evenly spaced frames, the caption at the left, the time above: one PNG.

    Args:
        rows: clips of any length and size; see `compare` for samples beside their nearest clips.
        columns: frames shown per clip, fewer where a clip has fewer.
    """
    shown = [_spread(len(clip.frames), columns) for clip in rows]
    images = [[_thumbnail(clip.frames[i]) for i in picks] for clip, picks in zip(rows, shown, strict=True)]
    heights = [max(image.height for image in row) + 34 for row in images]
    width = max(sum(image.width + 8 for image in row) for row in images)
    sheet = Image.new("RGB", (_CAPTION_PX + width + 8, 12 + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = 12
    for clip, picks, row, height in zip(rows, shown, images, heights, strict=True):
        caption = textwrap.fill(clip.caption, 26, max_lines=5, placeholder=" …")
        draw.multiline_text((16, y + 16), caption, _INK, _font(15), spacing=5)
        x = _CAPTION_PX
        for index, image in zip(picks, row, strict=True):
            draw.text((x, y), f"{index / clip.fps:.2f} s", _PALE, _font(12))
            sheet.paste(image, (x, y + 18))
            x += image.width + 8
        y += height
    sheet.save(path)
    return path


def compare(samples: Sequence[Clip], references: Sequence[Clip]) -> list[Clip]:
    """Rows for a contact sheet: each sample, and under it the reference nearest to it with its PSNR."""
    rows = []
    for sample in samples:
        index, distance_db = nearest(sample, references)
        match = references[index]
        rows += [
            replace(sample, caption=f"sample: {sample.caption}".rstrip(": ")),
            replace(match, caption=f"nearest clip, {distance_db:.1f} dB: {match.caption}".rstrip(": ")),
        ]
    return rows


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 tensors of one shape, in dB; infinite if they are equal."""
    if a.shape != b.shape or a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(
            f"psnr of {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}: "
            "both must be uint8 and of one shape"
        )
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def nearest(clip: Clip, references: Sequence[Clip]) -> tuple[int, float]:
    """Index of the reference with the highest PSNR against the clip, and that PSNR in dB."""
    if not references:
        raise ValueError("references = []: a nearest clip needs at least one")
    scores = [psnr(clip.frames, reference.frames) for reference in references]
    best = max(range(len(scores)), key=scores.__getitem__)
    return best, scores[best]


def _slug(caption: str) -> str:
    return re.sub(r"\W+", "_", caption.lower()).strip("_")[:48]


def _spread(length: int, columns: int) -> list[int]:
    count = min(length, columns)
    return [round(i * (length - 1) / max(1, count - 1)) for i in range(count)]


def _enlarge(frames_THW3: Tensor, factor: int) -> Tensor:
    return frames_THW3.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _write_mp4(path: Path, frames_THW3: np.ndarray[Any, Any], fps: float) -> None:
    import av

    # H.264 halves the colour planes: sizes must be even, and the repeated edge is not seen.
    odd_h, odd_w = (size % 2 for size in frames_THW3.shape[1:3])
    frames = np.pad(frames_THW3, ((0, 0), (0, odd_h), (0, odd_w), (0, 0)), mode="edge")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14", "movflags": "faststart"}
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode())


def _write_gif(path: Path, frames_THW3: np.ndarray[Any, Any], fps: float) -> None:
    # One palette for the whole clip: a palette per frame flickers.
    some = frames_THW3[_spread(len(frames_THW3), 8)]
    palette = Image.fromarray(some.reshape(-1, some.shape[2], 3)).quantize(256, Image.Quantize.MEDIANCUT)
    frames = [Image.fromarray(frame).quantize(palette=palette) for frame in frames_THW3]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def _thumbnail(frame_HW3: Tensor) -> Image.Image:
    height, width = frame_HW3.shape[:2]
    if height <= _THUMBNAIL_PX:
        return Image.fromarray(_enlarge(frame_HW3[None], _THUMBNAIL_PX // height)[0].numpy())
    size = (_THUMBNAIL_PX, max(1, round(width * _THUMBNAIL_PX / height)))
    small = F.interpolate(frame_HW3.permute(2, 0, 1)[None], size, mode="bilinear", antialias=True)[0]
    return Image.fromarray(small.permute(1, 2, 0).contiguous().numpy())


@lru_cache(maxsize=4)
def _font(size: int) -> Any:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
