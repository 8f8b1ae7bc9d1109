"""Clips on disk are the clips that were made; nearness is measured in dB."""

import math

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.recipe import Clip
from uvit.clips import DataConfig, to_frames, to_video
from uvit.dataset import open_dataset
from uvit.media import compare, contact_sheet, nearest, psnr, save_clips


def clip(frames: int = 6, height: int = 32, width: int = 40, caption: str = "", seed: int = 0) -> Clip:
    data = open_dataset(DataConfig(kind="shapes", frames=frames, height=height, width=width), seed)
    made = data.clips(1)[0]
    return Clip(made.frames, caption or made.caption, made.fps)


def test_pixels_survive_the_way_to_the_model_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    assert torch.equal(to_frames(to_video(pixels)), pixels)
    assert to_frames(torch.tensor([-9.0, 9.0, 0.0]).reshape(3, 1, 1, 1)).flatten().tolist() == [0, 255, 128]


def test_psnr_of_known_errors():
    a = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(a, a - 5) == pytest.approx(20 * math.log10(255 / 5))
    half = a.clone()
    half[0] += 2
    assert psnr(a, half) == pytest.approx(10 * math.log10(255**2 / 2))
    for other in (a[:1], a.float()):
        with pytest.raises(ValueError, match="both must be uint8 and of one shape"):
            psnr(a, other)


def test_nearest_finds_the_clip_a_sample_came_from():
    references = [clip(seed=k) for k in range(4)]
    noise = torch.randint(-6, 7, references[2].frames.shape, generator=torch.Generator().manual_seed(0))
    noisy = Clip((references[2].frames.int() + noise).clamp(0, 255).to(torch.uint8), "noisy", 8)
    index, distance_db = nearest(noisy, references)
    assert index == 2
    assert distance_db == psnr(noisy.frames, references[2].frames) > 30
    assert nearest(references[1], references) == (1, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        nearest(noisy, [])


def test_compare_pairs_each_sample_with_its_nearest_clip():
    references = [clip(seed=k) for k in range(3)]
    rows = compare([references[2], references[0]], references)
    assert [r.frames is references[k].frames for r, k in zip(rows, (2, 2, 0, 0), strict=True)] == [True] * 4
    assert rows[0].caption == f"sample: {references[2].caption}"
    assert rows[1].caption == f"nearest clip, inf dB: {references[2].caption}"


@pytest.mark.parametrize("size", [(6, 32, 40), (1, 33, 31), (3, 301, 257)])
def test_files_hold_the_clip(tmp_path, size):
    made = clip(*size)
    factor = max(1, round(256 / size[2]))
    video, gif, sheet = save_clips([made], tmp_path / "new" / "folder")
    assert sheet.name == "contact_sheet.png"
    assert video.stem == gif.stem == "000_" + made.caption.replace(" ", "_")
    large = made.frames.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    height, width = large.shape[1:3]
    with av.open(str(video)) as container:
        assert container.streams.video[0].average_rate == 8
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    decoded = torch.from_numpy(np.stack(frames))
    assert decoded.shape == (size[0], height + height % 2, width + width % 2, 3)
    assert psnr(decoded[:, :height, :width], large) > 32
    with Image.open(gif) as image:
        assert getattr(image, "n_frames", 1) == size[0]
        shown = []
        for k in range(size[0]):
            image.seek(k)
            shown.append(torch.from_numpy(np.array(image.convert("RGB"))))
            assert image.info.get("duration", 125) in (120, 125)
    assert psnr(torch.stack(shown), large) > 30


def test_a_sheet_has_a_row_per_clip_and_a_column_per_frame(tmp_path):
    colours = [(200, 20, 20), (20, 200, 20), (20, 20, 200)]
    rows = [
        Clip(torch.tensor(colours[k], dtype=torch.uint8).expand(frames, 16, 16, 3), caption, 4.0)
        for k, (frames, caption) in enumerate([(5, "red"), (2, "grün " * 60), (30, "")])
    ]
    with Image.open(contact_sheet(rows, tmp_path / "sheet.png", columns=6)) as sheet:
        pixels = torch.from_numpy(np.array(sheet))
    tiles = [int((pixels == torch.tensor(colour)).all(-1).sum()) / 128**2 for colour in colours]
    assert tiles == [5, 2, 6]
    tops = [(pixels == torch.tensor(c)).all(-1).any(1).nonzero()[0].item() for c in colours]
    assert tops == sorted(tops)


def test_names_of_files_come_from_captions(tmp_path):
    paths = save_clips(
        [clip(2, caption="Über/../alles: ?"), clip(2, caption="x" * 99), Clip(clip(2).frames, "", 8)],
        tmp_path,
    )
    assert [p.name for p in paths[:-1:2]] == ["000_über_alles.mp4", f"001_{'x' * 48}.mp4", "002.mp4"]
    assert all(p.parent == tmp_path and p.stat().st_size > 0 for p in paths)
    with pytest.raises(ValueError, match="nothing to save"):
        save_clips([], tmp_path)
