"""Whole runs with weights, moments and averages of fewer bits: resumed, continued otherwise, exported."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dtrain.config import RunConfig, load
from dtrain.dist import World
from dtrain.dryrun import dry_run
from dtrain.export import export
from dtrain.sampling import draw_clips
from dtrain.trainer import train
from tests.checkpoints import all_tensors
from tests.dtrain.tiny_dit import TinyDiT
from uvit.clips import DataConfig
from uvit.config import UViTConfig
from uvit.recipe import SampleTable, VideoConfig, video

CONFIG = """
recipe = "tests.dtrain.tiny_dit:recipe"
[train]
steps = 4
global_batch = 4
micro_batch = 2
[optim]
lr = 1e-3
warmup_steps = 2
clip_norm = 0.5
weights = "bf16"
moments = "8bit"
[ema]
dtype = "bf16"
[checkpoint]
every = 2
[metrics]
tensorboard = false
[model]
width = 128
depth = 2
"""


def config(folder: Path, name: str, *sets: str) -> RunConfig:
    path = folder / "small.toml"
    path.write_text(CONFIG)
    return load(path, [f"output={folder}", f"name={name}", *sets])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(config(folder, "whole"))
    return folder / "whole"


def stopped(run: Path, name: str) -> Path:
    """A copy of a run that ended after 2 of its 4 steps."""
    copied = run.parent / name
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "checkpoints" / "step-00000004")
    return copied


def final(run: Path) -> dict[str, torch.Tensor]:
    return all_tensors(run / "checkpoints" / "step-00000004")


def test_resume_is_bit_for_bit(run: Path) -> None:
    resumed, expected = stopped(run, "resumed"), final(run)
    train(config(run.parent, "resumed"))
    actual = final(resumed)
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not actual[name].equal(expected[name])]
    kinds = {name.split(".")[0]: x.dtype for name, x in expected.items() if name.endswith("qkv.weight")}
    assert kinds == {"model": torch.bfloat16, "ema": torch.bfloat16}
    assert expected["optim.blocks.0.qkv.weight.exp_avg_codes"].dtype == torch.uint8


@pytest.mark.parametrize(("field", "kind"), [("optim.weights", "model"), ("ema.dtype", "ema")])
def test_a_run_goes_on_in_another_precision(
    run: Path, field: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    resumed = stopped(run, f"fp32-{kind}")
    with caplog.at_level(logging.WARNING, "dtrain"):
        train(config(run.parent, resumed.name, f"{field}=fp32"))
    folder = resumed / "checkpoints" / "step-00000002"
    assert f'{field} = "fp32": what {folder} has in bf16 is taken exactly.' in caplog.messages
    dtypes = {name.split(".")[0]: x.dtype for name, x in final(resumed).items() if name[:5] != "optim"}
    assert dtypes == {"model": torch.bfloat16, "ema": torch.bfloat16} | {kind: torch.float32}


def test_moments_cannot_change(run: Path) -> None:
    stopped(run, "other-moments")
    with pytest.raises(ValueError, match=r'optim.moments = "fp32", but .*: set optim.moments = "8bit"'):
        train(config(run.parent, "other-moments", "optim.moments=fp32"))


@pytest.mark.parametrize(("ema", "kind"), [(True, "ema"), (False, "model")])
def test_what_is_exported_is_what_was_kept(run: Path, ema: bool, kind: str) -> None:
    exported = load_file(export(run, run / f"{kind}.safetensors", ema=ema))
    assert {x.dtype for x in exported.values()} == {torch.bfloat16}
    stored = final(run)
    assert all(x.equal(stored[f"{kind}.{name}"]) for name, x in exported.items())


class Elsewhere(nn.Module):
    """Its parameters are not where it computes, as with `shard.cpu_offload`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, device="meta"))

    def forward(self, x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
        return x


@pytest.mark.usefixtures("single_process_group")
def test_samples_are_computed_where_the_rank_computes() -> None:
    """The recipe's own device, that of the parameters, is for models in one piece."""
    sizes = UViTConfig(input_size=(2, 8, 8), patch_size=(2, 4, 4), in_channels=3, width=24, heads=2)
    data = DataConfig(kind="shapes", frames=2, height=8, width=8, workers=0)
    recipe = video(VideoConfig(model=sizes, data=data, sample=SampleTable(steps=2, guidance=0.0)))
    world = World(rank=0, size=1, device=torch.device("cpu"))
    (clip,) = draw_clips(recipe, Elsewhere(), None, world, count=1, seed=0)
    assert clip.frames.shape == (2, 8, 8, 3)


def test_a_dry_run_says_what_state_takes(tmp_path: Path) -> None:
    def state(*sets: str) -> str:
        return dict(dry_run(config(tmp_path, "dry", *sets), 2))["state per rank"]

    numbers = sum(p.numel() for p in TinyDiT(6, 128, 2, 2, 0.0).parameters())
    half = f"{numbers / 2**20:,.2f} MiB"  # 2 bytes a number, on each of two ranks one half
    assert f"parameters {half} (bf16) + gradients {half} + AdamW" in state()
    assert state().endswith(f" (moments 8bit) + EMA {half} (bf16)")
    whole = f"{2 * numbers / 2**20:,.2f} MiB"
    assert f"parameters {whole} (fp32) + gradients {whole}" in state("optim.weights=fp32")
    assert state("ema.enabled=false").endswith("EMA 0.00 MiB")
    assert state("shard.cpu_offload=true").endswith(", on the host (shard.cpu_offload)")
