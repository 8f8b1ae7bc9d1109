"""What a run says when it begins, and what it leaves in its folder: all of it rank 0's."""

import json
from collections.abc import Iterator, Sequence

from torch import nn

from dtrain.comm import Comm
from dtrain.config import RunConfig, to_toml
from dtrain.dist import World
from dtrain.metrics import NullLog, RunLog
from dtrain.metrics.plot import loss_curve
from dtrain.metrics.records import disk_faults_said
from dtrain.recipe import Clip, Recipe
from dtrain.sharding.shard import compute_dtype

__all__ = ["draw_loss", "first_words", "open_log", "write_config", "write_samples"]


def open_log(config: RunConfig, world: World, done: int) -> NullLog:
    """The log of a rank of a run that has taken `done` steps; enter it as a context manager."""
    total = config.train.steps
    if not world.is_main:
        return NullLog(config.metrics, total_steps=total, resume_step=done)
    return RunLog(
        config.metrics,
        config.run_dir,
        total_steps=total,
        resume_step=done,
        device=world.device,
        dtype=compute_dtype(config.shard, world.device.type),
        world=world.size,
        local_world=world.local_size,
    )


def first_words(config: RunConfig, world: World, model: nn.Module, comm: Comm | None) -> Iterator[str]:
    """What is trained, and how, a line a thing."""
    count = sum(p.numel() for p in model.parameters())
    dtype = str(compute_dtype(config.shard, world.device.type)).removeprefix("torch.")
    replicate, shard = config.mesh.sizes(world.size)
    train = config.train
    yield (
        f"{count / 1e6:.2f}M parameters on {world.size} {world.device.type} rank(s), mesh {replicate} x "
        f"{shard} (replicate x shard), weights in {config.optim.weights}, compute in {dtype}, "
        f"{train.accumulation(world.size)} micro-batch(es) of {train.micro_batch} per rank and step"
    )
    for line in comm.said if comm else ():
        yield f"comm: {line}"


def write_config(config: RunConfig) -> None:
    """The config as it was understood, so that the folder explains itself."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.toml").write_text(to_toml(config))


def write_samples(recipe: Recipe, clips: Sequence[Clip], config: RunConfig, step: int) -> str:
    """Write and score clips; returns what there is to say. OSError where the disk refuses them."""
    folder = config.run_dir / "samples" / f"step-{step:08d}"
    if recipe.save_clips:
        recipe.save_clips(clips, folder)
    scores = dict(recipe.score(clips, config.seed, folder)) if recipe.score else {}
    if scores:
        (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    figures = "".join(f", {name} {value:.2f}" for name, value in scores.items())
    return f"step {step}: samples in {folder}{figures}"


def draw_loss(config: RunConfig) -> None:
    """The loss curve beside the records that it is drawn from."""
    picture = config.run_dir / "loss.png"
    with disk_faults_said(str(picture)):
        loss_curve(config.run_dir / "metrics.jsonl", picture)
