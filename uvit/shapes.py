"""Generated clips: a shape crosses the frame, and its caption says so ("a red circle moves right").

They need no file, exist in every size and length, and can be judged by eye: right or wrong colour, shape and
direction. A shape is a polygon with rounded corners, drawn from the distance d of a pixel to its outline, in
pixels and negative inside (https://iquilezles.org/articles/distfunctions2d/): it covers clamp(1/2 - d, 0, 1)
of the pixel, and so moves smoothly through sub-pixel positions.

Shapes: T frames, H height, W width, V vertices.
"""

import colorsys
import hashlib
import math
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.recipe import Clip
from dtrain.rng import derive_seed
from uvit.clips import DataConfig, item_of, to_video

_FPS = 8.0
_COLOURS = {
    "red": (226, 61, 54),
    "orange": (245, 144, 34),
    "yellow": (250, 212, 50),
    "green": (58, 170, 84),
    "blue": (45, 112, 214),
    "purple": (140, 72, 190),
}
_DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


def _ring(radii: tuple[float, ...], turn: float) -> list[tuple[float, float]]:
    angles = [2 * math.pi * (k / len(radii) + turn) for k in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _plus(arm: float, half: float) -> list[tuple[float, float]]:
    corner = [(arm, -half), (arm, half), (half, half)]
    turns = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]
    return [(a * x + b * y, c * x + d * y) for a, b, c, d in turns for x, y in corner]


# name -> (polygon in units of the shape's radius, y down; radius of its rounded corners)
_SHAPES: dict[str, tuple[list[tuple[float, float]], float]] = {
    "circle": ([(0.0, 0.0)], 0.9),
    "square": (_ring((1.0,) * 4, 1 / 8), 0.12),
    "triangle": (_ring((1.0,) * 3, -1 / 4), 0.12),
    "star": (_ring((1.0, 0.48) * 5, -1 / 4), 0.08),
    "cross": (_plus(0.88, 0.28), 0.08),
    "diamond": (_ring((1.0, 0.68) * 2, -1 / 4), 0.1),
}

CLASSES = tuple(
    f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape} moves {direction}"
    for colour, shape, direction in product(_COLOURS, _SHAPES, _DIRECTIONS)
)
_LOOKS = tuple(product(_COLOURS.values(), _SHAPES.values(), _DIRECTIONS.values()))
# Coprime to the number of classes: successive items differ, and 144 of them show each class once.
_CLASS_STEP = 67


class Shapes:
    """Clips of moving shapes, see uvit.clips.ClipDataset: endless, or `config.limit` of them."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.classes = CLASSES
        self.skipped: tuple[tuple[str, str], ...] = ()
        settings = (config.frames, config.height, config.width, config.limit, seed, CLASSES)
        self.fingerprint = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def __getitem__(self, index: int) -> dict[str, Any]:
        limit = self.config.limit
        item = item_of(index, limit, self.seed) if limit else index
        label = self._label(item)
        return {
            "video": to_video(self._draw(item)),
            "index": index,
            "caption": CLASSES[label],
            "class": label,
            "source": f"shapes/{item}",
            "skipped": [],
        }

    def clips(self, count: int) -> list[Clip]:
        """The first `count` clips in their unshuffled order (fewer if `config.limit` is less)."""
        items = range(min(count, self.config.limit or count))
        fps = (self.config.fps or _FPS) / self.config.stride
        return [Clip(self._draw(item), CLASSES[self._label(item)], fps) for item in items]

    def _label(self, item: int) -> int:
        return (derive_seed(self.seed, "shapes") + item * _CLASS_STEP) % len(CLASSES)

    def _draw(self, item: int) -> Tensor:
        draw = np.random.Generator(np.random.PCG64(derive_seed(self.seed, "shape", item)))
        size = (self.config.height, self.config.width)
        colour, (polygon, rounding), direction = _LOOKS[self._label(item)]
        radius = min(size) * draw.uniform(0.17, 0.25)
        path_T2 = _path(self.config.frames, size, direction, radius, draw.uniform(-1, 1))
        ground_HW3 = _background(size, draw.uniform())
        distance_THW = radius * _distance(polygon, rounding, path_T2, size, radius)
        inside = (0.5 - distance_THW).clamp(0, 1)[..., None]
        # a soft edge of shade, so that no colour drowns in its ground
        shade = 0.75 + 0.25 * (distance_THW / (0.35 * radius)).clamp(0, 1)[..., None]
        frames = torch.lerp(ground_HW3 * shade, torch.tensor(colour, dtype=torch.float32), inside)
        return frames.round().to(torch.uint8)


def _path(
    frames: int, size: tuple[int, int], direction: tuple[int, int], radius: float, aside: float
) -> Tensor:
    """Centres (x, y) in pixels, (T, 2), from side to side; `aside` in [-1, 1] is off the middle."""
    room = torch.tensor([size[1] / 2 - 1.1 * radius, size[0] / 2 - 1.1 * radius])
    along = torch.tensor(direction, dtype=torch.float32)
    progress = torch.linspace(-1, 1, frames)[:, None] if frames > 1 else torch.zeros(1, 1)
    middle = torch.tensor([size[1] / 2, size[0] / 2])
    return middle + room * (along * progress + along.abs().flip(0) * aside * 0.8)


def _background(size: tuple[int, int], hue: float) -> Tensor:
    """A pale vertical gradient, (H, W, 3) in 0 to 255."""
    top, bottom = (torch.tensor(colorsys.hsv_to_rgb(hue, s, v)) * 255 for s, v in ((0.06, 0.98), (0.2, 0.86)))
    return torch.lerp(top, bottom, torch.linspace(0, 1, size[0])[:, None, None]).expand(*size, 3)


def _distance(
    polygon: list[tuple[float, float]], rounding: float, path_T2: Tensor, size: tuple[int, int], radius: float
) -> Tensor:
    """Signed distance of every pixel to the moving polygon, in radii, (T, H, W); negative inside."""
    x = (torch.arange(size[1]) + 0.5 - path_T2[:, 0, None])[:, None, :] / radius  # (T, 1, W)
    y = (torch.arange(size[0]) + 0.5 - path_T2[:, 1, None])[:, :, None] / radius  # (T, H, 1)
    # Rounding grows the outline; shrinking the polygon first keeps its size.
    vertices = [(px * (1 - rounding), py * (1 - rounding)) for px, py in polygon]
    nearest = torch.full((len(path_T2), *size), math.inf)
    inside = torch.zeros_like(nearest, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
        ex, ey, dx, dy = bx - ax, by - ay, x - ax, y - ay
        t = ((dx * ex + dy * ey) / max(ex * ex + ey * ey, 1e-12)).clamp(0, 1)
        nearest = torch.minimum(nearest, (dx - ex * t) ** 2 + (dy - ey * t) ** 2)
        if ey:  # a ray to the right crosses this edge: even-odd rule
            inside ^= ((y >= ay) != (y >= by)) & (dx < dy * ex / ey)
    distance = nearest.sqrt()
    return torch.where(inside, -distance, distance) - rounding
