"""Generated clips show what their captions say."""

import pickle
from itertools import pairwise

import pytest
import torch

from dtrain.data import loader
from dtrain.recipe import DataState
from uvit.clips import DataConfig, collate, to_frames, to_video
from uvit.dataset import open_dataset
from uvit.shapes import CLASSES, Shapes

_RGB = {
    "red": (226, 61, 54),
    "orange": (245, 144, 34),
    "yellow": (250, 212, 50),
    "green": (58, 170, 84),
    "blue": (45, 112, 214),
    "purple": (140, 72, 190),
}
_STEP = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
# Share of its bounding box that a shape fills, and width : height of the box. A circle fills π/4; a triangle
# or diamond with sharp corners 1/2, more when they are rounded.
_FORM = {
    "circle": ((0.74, 0.83), 1.0),
    "square": ((0.97, 1.0), 1.0),
    "triangle": ((0.53, 0.6), 1.11),
    "star": ((0.43, 0.5), 1.05),
    "cross": ((0.54, 0.64), 1.0),
    "diamond": ((0.5, 0.6), 0.71),
}


def shapes(seed: int = 0, **fields) -> Shapes:
    return Shapes(DataConfig(kind="shapes", **{"frames": 5, "height": 64, "width": 64, **fields}), seed)


def masks(frames_THW3: torch.Tensor, colour: str) -> torch.Tensor:
    return ((frames_THW3.int() - torch.tensor(_RGB[colour])).abs().amax(-1) < 3).double()


def test_144_items_show_every_class_once_and_as_captioned():
    data = shapes(frames=3, height=96, width=120)
    clips = data.clips(144)
    assert sorted(clip.caption for clip in clips) == sorted(CLASSES)
    xs, ys = torch.arange(120.0).double(), torch.arange(96.0).double()
    for clip in clips:
        _, colour, shape, _, direction = clip.caption.split()
        mask_THW = masks(clip.frames, colour)
        area_T = mask_THW.sum((1, 2))
        centre_T2 = torch.stack([(mask_THW.sum(1) @ xs) / area_T, (mask_THW.sum(2) @ ys) / area_T], 1)
        moved = centre_T2[-1] - centre_T2[0]
        along = moved @ torch.tensor(_STEP[direction]).double()
        assert along > 36, clip.caption
        assert (moved.norm() - along).abs() < 0.5, clip.caption
        assert area_T.max() - area_T.min() < 0.06 * area_T.max(), clip.caption  # it never leaves the frame
        ink = mask_THW[1].bool()
        width, height = int(ink.any(0).sum()), int(ink.any(1).sum())
        (low, high), aspect = _FORM[shape]
        assert low < area_T[1] / (width * height) <= high, clip.caption
        assert abs(width - aspect * height) < 2.5, clip.caption


def test_neighbouring_captions_differ_and_grammar_holds():
    captions = [clip.caption for clip in shapes().clips(12)]
    assert all(a.split()[1] != b.split()[1] for a, b in pairwise(captions))
    assert "an orange star moves left" in CLASSES
    assert "a red circle moves right" in CLASSES


def test_an_item_depends_on_seed_and_index_only():
    data, again = shapes(seed=4), pickle.loads(pickle.dumps(shapes(seed=4)))
    for index in (1000, 3, 0):
        assert torch.equal(data[index]["video"], again[index]["video"])
        assert data[index]["class"] == CLASSES.index(data[index]["caption"])
    assert not torch.equal(data[3]["video"], shapes(seed=5)[3]["video"])
    assert not torch.equal(data[3]["video"], data[147]["video"])  # one class, another path and ground
    assert data[3]["caption"] == data[147]["caption"]


@pytest.mark.parametrize("size", [(1, 9, 13), (2, 64, 32), (33, 16, 16)])
def test_any_length_and_size(size):
    frames, height, width = size
    sample = shapes(frames=frames, height=height, width=width)[0]
    assert sample["video"].shape == (3, frames, height, width)
    assert sample["video"].abs().max() <= 1
    assert sample["skipped"] == []


def test_edges_are_smooth():
    """Moved by less than a tenth of a pixel, the picture changes: positions between pixels are drawn."""
    slow = to_frames(shapes(frames=400, height=32, width=32)[0]["video"])
    assert all(not torch.equal(a, b) for a, b in pairwise(slow[100:140]))


def test_limit_repeats_the_same_clips_in_epochs():
    data = open_dataset(DataConfig(kind="shapes", frames=3, height=16, width=16, limit=4), seed=0)
    fixed = {to_video(clip.frames).numpy().tobytes() for clip in data.clips(10)}
    assert len(fixed) == len(data.clips(10)) == 4
    for epoch in range(3):
        assert {data[4 * epoch + k]["video"].numpy().tobytes() for k in range(4)} == fixed


def test_workers_read_the_same_stream():
    data = shapes(height=16, width=16)
    state = DataState(seed=0, sample=6, micro_batch=3)
    read = [iter(loader(data, 0, 1, state, workers=n, collate=collate)) for n in (0, 1)]
    for _ in range(3):
        here, there = next(read[0]), next(read[1])
        assert torch.equal(here["video"], there["video"])
        assert here["caption"] == there["caption"]
    assert here["index"].tolist() == [12, 13, 14]


def test_the_fingerprint_follows_what_is_drawn():
    marks = {d.fingerprint for d in (shapes(), shapes(), shapes(seed=1), shapes(frames=6), shapes(limit=3))}
    assert len(marks) == 4
