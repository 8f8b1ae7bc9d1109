"""Whole video runs from the command line, with real processes and real files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.checkpoint import step_folders
from dtrain.config import ConfigError, build_recipe, load
from dtrain.metrics.records import read_records
from tests.checkpoints import all_tensors
from tests.launch import run_python, torchrun

CONFIG = """
recipe = "uvit.recipe:video"
output = "{output}"
[train]
steps = 4
global_batch = 4
micro_batch = 2
sample_every = 4
samples = 3
[model]
input_size = [4, 8, 8]
patch_size = [2, 4, 4]
in_channels = 3
width = 48
depth = 2
heads = 2
qk_norm = true
positions = "{positions}"
condition = "{condition}"
num_classes = 4
text_dim = 16
text_tokens = 16
[objective]
kind = "{objective}"
[data]
path = "{path}"
frames = 4
height = 8
width = 8
captions = "{captions}"
workers = 1
[sample]
steps = 3
guidance = 1.5
[optim]
lr = 1e-3
warmup_steps = 2
[ema]
decay = 0.9
[metrics]
log_every = 2
"""


def config(folder: Path, clips: Path, name: str, **changes: str) -> Path:
    settings = {
        "output": str(folder),
        "path": str(clips),
        "positions": "rope",
        "condition": "text",
        "objective": "flow",
        "captions": "auto",
    }
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.format(**settings | changes))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Any]) -> Path:
    """Two classes of good videos with captions, and files of every kind that cannot be used."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "walks" / "a.mp4", 12)
    (folder / "walks" / "a.txt").write_text("a walk")
    write_video(folder / "runs" / "b.webm", 12)
    (folder / "runs" / "b.txt").write_text("a run")
    write_video(folder / "runs" / "short.mp4", 2)
    (folder / "runs" / "empty.mp4").touch()
    (folder / "walks" / "text.mp4").write_text("not a video at all")
    whole = (folder / "walks" / "a.mp4").read_bytes()
    (folder / "walks" / "cut.mp4").write_bytes(whole[:200])
    return folder


@pytest.mark.distributed
def test_two_ranks_train_on_a_folder_with_broken_files(tmp_path: Path, clips: Path) -> None:
    done = torchrun(2, "-m", "dtrain", "train", config(tmp_path, clips, "text"))
    run = tmp_path / "text"
    assert [r["step"] for r in read_records(run / "metrics.jsonl")] == [1, 2, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert {entry["source"] for entry in summary["skipped"]} == {
        "runs/empty.mp4",
        "runs/short.mp4",
        "walks/cut.mp4",
        "walks/text.mp4",
    }
    assert all(entry["reason"] for entry in summary["skipped"])
    for source in ("runs/short.mp4", "walks/text.mp4"):
        assert source in done.stdout  # the table at the end
    made = {path.name for path in (run / "samples" / "step-00000004").iterdir()}
    assert {"contact_sheet.png", "nearest_clips.png"} <= made
    assert sum(name.endswith(".mp4") for name in made) == sum(name.endswith(".gif") for name in made) == 3
    assert list((run / "tensorboard").glob("events*"))

    out = tmp_path / "sampled"
    run_python("-m", "dtrain", "sample", run, "--out", out, "--count", 2, "--option", 'prompts=["a walk"]')
    assert sorted(path.name for path in out.glob("*.mp4")) == ["000_a_walk.mp4", "001_a_walk.mp4"]
    wrong = ("--option", "stops=9", "--option", "steps=many")
    refused = run_python("-m", "dtrain", "sample", run, "--out", out, *wrong, check=False)
    assert refused.returncode == 2
    assert "stops = 9: no such field; did you mean steps?" in refused.stderr
    assert 'steps = "many": must be an integer' in refused.stderr


@pytest.mark.distributed
def test_noise_prediction_by_class_in_one_process(tmp_path: Path, clips: Path) -> None:
    path = config(
        tmp_path,
        clips,
        "noise",
        objective="noise",
        condition="class",
        captions="folders",
        positions="learned",
    )
    run_python("-m", "dtrain", "train", path)
    sheet = tmp_path / "noise" / "samples" / "step-00000004" / "contact_sheet.png"
    assert sheet.stat().st_size > 1000


def test_a_video_run_resumes_bit_for_bit(tmp_path: Path, clips: Path) -> None:
    def train(name: str, *sets: str) -> dict[str, torch.Tensor]:
        path = config(tmp_path, clips, name)
        settings = ("train.sample_every=0", "checkpoint.every=2", *sets)
        run_python("-m", "dtrain", "train", path, *(word for s in settings for word in ("--set", s)))
        return all_tensors(step_folders(tmp_path / name / "checkpoints")[-1])

    whole = train("whole")
    train("parts", "train.steps=2")
    parts = train("parts")
    assert parts.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(parts[name], whole[name])] == []


def test_a_folder_with_nothing_usable_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 100)
    done = run_python("-m", "dtrain", "train", config(tmp_path, tmp_path, "nothing"), check=False)
    assert done.returncode == 2
    assert "nothing usable among" in done.stderr
    assert "broken.mp4" in done.stderr
    assert "data.path" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.frames=5", "data.frames, data.height, data.width and model.patch_size"),
        ("model.heads=5", "heads = 5: does not divide width = 48"),
        ("model.in_channels=4", "clips are RGB"),
        ("objective.drop_condition=0.0", "needs objective.drop_condition > 0"),
        ("sample.solver=haun", "did you mean heun?"),
        ("text.encoder=clip", "bytes"),
    ],
)
def test_impossible_configs_are_named(tmp_path: Path, clips: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_recipe(load(config(tmp_path, clips, "wrong"), [setting]))


def test_a_config_typo_stops_the_run_with_one_message(tmp_path: Path, clips: Path) -> None:
    path = config(tmp_path, clips, "typo")
    done = run_python("-m", "dtrain", "train", path, "--set", "model.conditon=text", check=False)
    assert done.returncode == 2
    assert 'model.conditon = "text": no such field; did you mean model.condition?' in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "typo").exists()


def test_too_few_classes_are_named(tmp_path: Path, clips: Path) -> None:
    path = config(tmp_path, clips, "classes", condition="class", captions="folders")
    done = run_python("-m", "dtrain", "train", path, "--set", "model.num_classes=2", check=False)
    assert done.returncode == 2
    assert "model.num_classes = 2" in done.stderr
    assert "set it to 3" in done.stderr
