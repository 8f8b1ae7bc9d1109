"""Folders of videos: exact frames, nothing unusable unnamed, one stream on every world."""

import logging
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.data import loader
from dtrain.recipe import DataState
from uvit.clips import DataConfig, collate, to_frames, to_video
from uvit.dataset import open_dataset
from uvit.decode import VideoError, probe, read_clip
from uvit.folder import VideoFolder, scan


def config(folder: Path, **fields) -> DataConfig:
    return DataConfig(path=str(folder), **{"frames": 4, "height": 16, "width": 24, "workers": 0, **fields})


def numbers(frames: torch.Tensor) -> list[int]:
    """Which frames of a numbered video these are; (T, 3, H, W) or (3, T, H, W) in [-1, 1]."""
    if frames.is_floating_point():
        frames = to_frames(frames).permute(0, 3, 1, 2)
    return [round(float(frame[:, frame.shape[1] // 2 :].float().mean()) / 10) for frame in frames]


def decode_all(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_video) -> Path:
    """Five good videos in two classes."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("cats/a.mp4", "cats/b.webm", "dogs/c.mkv", "dogs/d.gif", "dogs/e.mp4"):
        write_video(root / name)
    return root


@pytest.mark.parametrize("gop", ["6", "50"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi", ".webm", ".gif"])
def test_a_seek_gives_the_frames_of_decoding_from_the_start(tmp_path, write_video, suffix, gop):
    path = tmp_path / f"video{suffix}"
    # 75 frames are 3 s: clips begin beyond the run-up of a seek, which MPEG-TS overshoots by up to a group
    options = {"g": gop, "bf": "2"} if suffix != ".gif" else {}
    write_video(path, frames=write_video(tmp_path / "n.gif", 25) * 3, options=options)
    whole = decode_all(path)
    timeline = probe(path)
    assert timeline.starts(5, 1 / timeline.rate) == len(whole) - 4
    for start in range(len(whole) - 4):
        clip = read_clip(path, timeline.times(start, 5, 1 / timeline.rate), 32, 48)
        assert torch.equal(clip, whole[start : start + 5]), start


def test_open_groups_of_pictures_are_exact(tmp_path, write_video):
    path = tmp_path / "open.mp4"
    options = {"x264-params": "open-gop=1:keyint=8:bframes=3:scenecut=0"}
    write_video(path, frames=write_video(tmp_path / "n.gif", 25) * 3, options=options)
    whole, timeline = decode_all(path), probe(path)
    for start in range(0, 70, 3):
        assert torch.equal(read_clip(path, timeline.times(start, 3, 0.04), 32, 48), whole[start : start + 3])


def test_variable_rate_keeps_the_speed_of_the_motion(tmp_path, write_video):
    times_ms = [0, 40, 80, 500, 900, 920, 940, 1600, 1640, 2000]
    path = tmp_path / "variable.mkv"
    write_video(path, len(times_ms), times_ms=times_ms)
    grid_s = [0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8]
    expected = [min(range(10), key=lambda k: abs(times_ms[k] - 1000 * t)) for t in grid_s]
    assert numbers(read_clip(path, grid_s, 32, 48)) == expected
    assert probe(path).last_s == 2.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"stride": 3}, [0, 3, 6, 9]),
        ({"fps": 12.5}, [0, 2, 4, 6]),
        ({"fps": 12.5, "stride": 2}, [0, 4, 8, 12]),
        ({"fps": 40.0}, [0, 1, 1, 2]),
    ],
)
def test_frame_rate_and_stride(tmp_path, write_video, fields, expected):
    write_video(tmp_path / "v.mp4")
    data = open_dataset(config(tmp_path, clips_per_video=1, **fields), seed=0)
    assert numbers(data[0]["video"]) == expected
    [clip] = data.clips(9)
    assert clip.fps == pytest.approx(fields.get("fps", 25.0) / fields.get("stride", 1))
    assert torch.equal(to_video(clip.frames), data[0]["video"])


def test_sample_has_the_shape_and_range_of_the_contract(folder):
    sample = open_dataset(config(folder), seed=0)[3]
    assert sample["video"].shape == (3, 4, 16, 24)
    assert sample["video"].dtype == torch.float32
    assert -1 <= sample["video"].min() < sample["video"].max() <= 1
    assert sample["index"] == 3
    batch = collate([sample, sample])
    assert batch["video"].shape == (2, 3, 4, 16, 24)
    assert batch["index"].tolist() == [3, 3]
    assert batch["class"].dtype == torch.int64
    assert batch["caption"] == ["", ""]


def test_crop_keeps_the_middle_and_resize_averages(tmp_path, write_video):
    frame = np.zeros((32, 96, 3), np.uint8)
    frame[:, 32:64] = 200
    frame[::2, 32:64] = 100  # rows that alternate: the average shows whether the resize is antialiased
    write_video(tmp_path / "wide.gif", frames=[frame])
    stripes = read_clip(tmp_path / "wide.gif", [0.0], 8, 8)[0].float()
    whole = decode_all(tmp_path / "wide.gif")[0, :, :, 32:64].float()
    assert (stripes[:, 2:-2, 2:-2] - whole.mean((1, 2))[:, None, None]).abs().max() < 12
    left = read_clip(tmp_path / "wide.gif", [0.0], 8, 8, anchor=(0.0, 0.0))
    assert left.max() == 0


def test_odd_sizes_and_wide_pixels(tmp_path, write_video):
    write_video(tmp_path / "odd.gif", size=(31, 45))
    assert read_clip(tmp_path / "odd.gif", [0.0, 0.04], 17, 9).shape == (2, 3, 17, 9)
    frame = np.zeros((32, 32, 3), np.uint8)  # shown as 32 x 64: its middle half is square
    frame[:, 8:24] = 200
    write_video(tmp_path / "wide.mkv", frames=[frame], pixel_aspect=2)
    aspect = probe(tmp_path / "wide.mkv").pixel_aspect
    assert aspect == 2
    assert read_clip(tmp_path / "wide.mkv", [0.0], 16, 16, pixel_aspect=aspect).min() > 150


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_turned_video_is_read_upright(tmp_path, write_video, rotation):
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :24] = 230
    write_video(tmp_path / "flat.mp4", frames=[frame] * 3)
    write_video(tmp_path / "turned.mp4", frames=[frame] * 3, rotation=rotation)
    turns = rotation // 90
    size = (32, 48) if turns % 2 == 0 else (48, 32)
    flat = read_clip(tmp_path / "flat.mp4", [0.0], 32, 48)
    turned = read_clip(tmp_path / "turned.mp4", [0.0], *size)
    assert torch.equal(turned, torch.rot90(flat, turns, (-2, -1)))


def test_unusable_files_are_skipped_by_name(tmp_path, write_video, caplog):
    write_video(tmp_path / "good.mp4")
    write_video(tmp_path / "sub/good.webm")
    write_video(tmp_path / "short.mp4", 2)
    data = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "truncated.mp4").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "headless.mp4").write_bytes(data[len(data) // 2 :])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 40)
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "good.txt").write_text("a grey stripe")
    (tmp_path / ".hidden").write_text("x")
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    with caplog.at_level(logging.WARNING):
        index = scan(config(tmp_path, frames=16))
    assert [e.source for e in index.entries] == ["good.mp4", "sub/good.webm"]
    reasons = dict(index.skipped)
    assert sorted(reasons) == [
        "empty.mp4",
        "gone.mp4",
        "headless.mp4",
        "image.png",
        "short.mp4",
        "text.mp4",
        "truncated.mp4",
    ]
    assert reasons["empty.mp4"] == "empty file"
    assert reasons["short.mp4"] == "too short: 0.04 s; 16 frames span 0.60 s"
    assert reasons["image.png"].startswith("too short")
    assert reasons["text.mp4"].startswith("cannot be read: Invalid data")
    assert reasons["truncated.mp4"].startswith(("cut short", "cannot be read"))
    assert all(name in caplog.text for name in reasons)
    assert '1 of 2 files have no caption: ""' in caplog.text


def test_images_are_clips_of_one_frame(tmp_path, write_video):
    for name in ("a.png", "b.jpg", "c.webp", "c.bmp", "c.tiff"):
        Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / name)
    write_video(tmp_path / "d.mp4")
    data = open_dataset(config(tmp_path, frames=1, limit=5), seed=0)
    pixels = torch.stack([to_frames(data[i]["video"]) for i in range(5)])
    assert pixels.shape == (5, 1, 16, 24, 3)
    assert (pixels.int() - torch.tensor([200, 30, 60])).abs().max() <= 4


def test_a_folder_without_videos_says_what_was_found(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        scan(config(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nothing usable among 0 files"):
        scan(config(tmp_path))
    (tmp_path / "a.mp4").write_text("text")
    with pytest.raises(ValueError, match=r"nothing usable among 1 files; a\.mp4: cannot be read"):
        scan(config(tmp_path))


def test_captions_and_classes(folder, tmp_path, write_video):
    index = scan(config(folder, captions="folders"))
    assert index.classes == ("cats", "dogs")
    assert [(e.caption, e.label) for e in index.entries] == [("cats", 0)] * 2 + [("dogs", 1)] * 3
    for name in ("a.mp4", "b.mp4", "sub/c.mp4", "d.mp4"):
        write_video(tmp_path / name, 4)
    (tmp_path / "a.txt").write_text("from the\n file ")
    (tmp_path / "b.txt").write_text("loses")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.mp4", "text": "wins"}\n\n')
    (tmp_path / "sub/metadata.jsonl").write_text('{"file_name": "c.mp4", "caption": "grüße"}\n')

    def captions(mode):
        return [e.caption for e in scan(config(tmp_path, captions=mode)).entries]

    assert captions("auto") == ["from the file", "wins", "", "grüße"]
    assert captions("files") == ["from the file", "loses", "", ""]
    assert captions("metadata") == ["", "wins", "", "grüße"]
    assert captions("none") == [""] * 4
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.mp4", "text": "x"}\n{"file": "a.mp4"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2"):
        scan(config(tmp_path))


def test_the_fingerprint_follows_the_clips(tmp_path, write_video):
    write_video(tmp_path / "a.mp4", 6)
    write_video(tmp_path / "b.mp4", 6)
    first = scan(config(tmp_path)).fingerprint
    assert scan(config(tmp_path)).fingerprint == first
    (tmp_path / "a.txt").write_text("a caption")
    captioned = scan(config(tmp_path)).fingerprint
    write_video(tmp_path / "b.mp4", 7)
    assert len({first, captioned, scan(config(tmp_path)).fingerprint}) == 3
    settings = [({}, 0), ({"workers": 2}, 0), ({"stride": 2, "frames": 2}, 0), ({"flip": True}, 0), ({}, 1)]
    marks = [open_dataset(config(tmp_path, **fields), seed).fingerprint for fields, seed in settings]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 4


def test_fixed_clips_are_spread_over_the_video(tmp_path, write_video):
    write_video(tmp_path / "long.mp4", 24)
    write_video(tmp_path / "tight.mp4", 5)
    data = VideoFolder(config(tmp_path, clips_per_video=3), seed=0)
    starts = [numbers(clip.frames.permute(0, 3, 1, 2))[0] for clip in data.clips(99)]
    assert starts == [0, 10, 20, 0, 1]  # 5 frames hold only two different clips of 4
    assert len(VideoFolder(config(tmp_path, clips_per_video=3, limit=2), seed=0)) == 2


def test_every_epoch_is_a_permutation_and_starts_move(folder):
    data = VideoFolder(config(folder), seed=7)
    again, other = VideoFolder(config(folder), seed=7), VideoFolder(config(folder), seed=8)
    samples = [data[i] for i in range(20)]
    epochs = [[s["source"] for s in samples[k : k + 5]] for k in range(0, 20, 5)]
    assert all(sorted(epoch) == [e.source for e in data.index.entries] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    starts = {numbers(s["video"])[0] for s in samples}
    assert len(starts) > 5
    for i in (19, 3, 11):  # in any order
        assert torch.equal(again[i]["video"], samples[i]["video"])
    assert any(other[i]["source"] != samples[i]["source"] for i in range(5))


def test_flip_and_random_crop_belong_to_the_sample(folder):
    plain = VideoFolder(config(folder, limit=1, clips_per_video=1), seed=0)
    flipped = VideoFolder(config(folder, limit=1, clips_per_video=1, flip=True), seed=0)
    original = plain[0]["video"]
    turned = [torch.equal(flipped[i]["video"], original.flip(-1)) for i in range(12)]
    assert [torch.equal(flipped[i]["video"], original) for i in range(12)] == [not t for t in turned]
    assert 0 < sum(turned) < 12
    random = VideoFolder(config(folder, limit=1, clips_per_video=1, crop="random", width=8), seed=0)
    assert torch.equal(random[1]["video"], random[1]["video"])
    assert len({random[i]["video"].numpy().tobytes() for i in range(6)}) > 1


def test_a_file_that_breaks_later_is_replaced_and_named(tmp_path, write_video):
    for name in "abc":
        write_video(tmp_path / f"{name}.mp4", options={"crf": "1", "g": "6"}, frames=_noise())
    data = VideoFolder(config(tmp_path), seed=0)
    before = [data[i] for i in range(9)]
    damaged = bytearray((tmp_path / "b.mp4").read_bytes())
    damaged[len(damaged) // 6 :] = bytes(len(damaged) - len(damaged) // 6)
    (tmp_path / "b.mp4").write_bytes(damaged)
    after = [data[i] for i in range(9)]
    hit = [i for i in range(9) if before[i]["source"] == "b.mp4"]
    assert len(hit) == 3
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if i in hit:
            assert new["source"] in {"a.mp4", "c.mp4"}
            assert [source for source, _ in new["skipped"]] == ["b.mp4"]
            assert torch.equal(new["video"], VideoFolder.__getitem__(data, i)["video"])
        else:
            assert torch.equal(old["video"], new["video"])
            assert new["skipped"] == []
    assert [source for source, _ in collate(after)["skipped"]] == ["b.mp4"] * 3
    for name in "ac":
        (tmp_path / f"{name}.mp4").unlink()
    with pytest.raises(ValueError, match="no file can be read any more"):
        data[0]
    with pytest.raises(VideoError):
        data.clips(1)


def test_damage_that_the_decoder_would_paper_over_is_noticed(tmp_path, write_video):
    path = tmp_path / "v.mp4"
    write_video(path, options={"crf": "1", "g": "6"}, frames=_noise())
    data = bytearray(path.read_bytes())
    middle = len(data) * 2 // 5
    data[middle : middle + 64] = bytes(byte ^ 0x5A for byte in data[middle : middle + 64])
    path.write_bytes(data)
    timeline = probe(path)
    assert len(decode_all(path)) == 24
    assert read_clip(path, timeline.times(0, 6, 0.04), 32, 48).shape[0] == 6
    with pytest.raises(VideoError, match="damaged frame"):
        read_clip(path, timeline.times(6, 6, 0.04), 32, 48)


def _noise() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 255, (32, 48, 3), dtype=np.uint8) for _ in range(24)]


def test_the_stream_is_one_on_every_world_worker_count_and_resume(folder):
    data = open_dataset(config(folder), seed=3)

    def read(count, rank=0, world=1, workers=0, sample=0, micro_batch=4):
        state = DataState(seed=3, sample=sample, micro_batch=micro_batch)
        batches = iter(loader(data, rank, world, state, workers=workers, collate=collate))
        return [next(batches) for _ in range(count)]

    whole = read(4)
    assert torch.cat([b["index"] for b in whole]).tolist() == list(range(16))
    workers = read(4, workers=2)
    resumed = [None, None, *read(2, sample=8)]
    ranks = [read(4, rank=r, world=2, micro_batch=2) for r in range(2)]
    for k, batch in enumerate(whole):
        assert torch.equal(batch["video"], workers[k]["video"])
        assert batch["source"] == workers[k]["source"]
        if k >= 2:
            assert torch.equal(batch["video"], resumed[k]["video"])
        both = torch.cat([ranks[0][k]["video"], ranks[1][k]["video"]])
        assert torch.equal(batch["video"], both)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "x", "frames": 0}, "frames = 0: too small"),
        ({"path": "x", "stride": 0}, "stride = 0: too small"),
        ({"path": "x", "workers": -1}, "workers = -1: too small"),
        ({}, "path = '': kind = 'folder' needs"),
    ],
)
def test_config_names_the_mistake(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
