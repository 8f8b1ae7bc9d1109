"""Generating clips: from a model in training on all its ranks, or from a finished run in one process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import nn

from dtrain.checkpoint import find_checkpoint
from dtrain.config import build_recipe, load
from dtrain.dist import World
from dtrain.export import read_weights
from dtrain.optim import EMA
from dtrain.recipe import Clip, Recipe, SampleRequest


def draw_clips(
    recipe: Recipe, model: nn.Module, ema: EMA | None, world: World, count: int, seed: int
) -> list[Clip]:
    """Generate `count` clips, each rank its share; rank 0 gets all of them in order, the others none.

    Every rank runs the same number of forward passes, as a sharded model demands.
    """
    assert recipe.sample is not None
    share = -(-count // world.size)
    request = SampleRequest(first=world.rank * share, count=share, seed=seed, options={}, device=world.device)
    model.eval()
    if ema:
        with ema.swapped_into(model):
            clips = recipe.sample(model, request)
    else:
        clips = recipe.sample(model, request)
    model.train()
    gathered: list[list[Clip]] | None = [[]] * world.size if world.is_main else None
    dist.gather_object(clips, gathered)
    return [clip for part in gathered for clip in part][:count] if gathered else []


def sample(
    run_dir: Path,
    out: Path,
    count: int = 4,
    step: int | None = None,
    ema: bool = True,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Generate clips from a run's checkpoint, in this process alone.

    Args:
        run_dir: folder of the run.
        out: folder for the files.
        count: number of clips.
        step: which checkpoint; the newest when None.
        ema: averaged weights rather than the trained ones.
        seed: of the noise; the same seed gives the same clips.
        options: overrides of the recipe's sampling settings.

    Returns:
        The files written.

    Raises:
        ValueError: the recipe cannot sample.
    """
    config = load(run_dir / "config.toml", [])
    recipe = build_recipe(config)
    if recipe.sample is None or recipe.save_clips is None:
        raise ValueError(f"The recipe {config.recipe} brings no sampler (Recipe.sample, Recipe.save_clips).")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = recipe.build()
    checkpoint = find_checkpoint(run_dir / "checkpoints", step)
    model.load_state_dict(read_weights(checkpoint, ema))
    model.to(device).eval()
    with Progress() as bar:
        task = bar.add_task("sampling", total=None)
        request = SampleRequest(
            first=0,
            count=count,
            seed=seed,
            options=options or {},
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        clips = recipe.sample(model, request)
    return recipe.save_clips(clips, out)
