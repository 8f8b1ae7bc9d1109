"""Weights out of a checkpoint: one process, no process group, no GPU.

The names in the file are the model's own parameter names; for U-ViT these are the official ones.
"""

import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from dtrain.checkpoint import find_checkpoint, read_progress
from dtrain.checkpoint.storage import Reader


def read_weights(checkpoint: Path, ema: bool = True) -> dict[str, Tensor]:
    """Read full (unsharded) weights on the CPU.

    Args:
        checkpoint: a checkpoint folder.
        ema: the averaged weights rather than the trained ones; buffers come with the trained ones.

    Raises:
        ValueError: averages were asked for and the run kept none.
    """
    reader = Reader(checkpoint)
    kinds = reader.tensors()
    kind = "ema" if ema else "model"
    wanted = {name: meta for name, meta in kinds.items() if name.split(".")[0] in ("model", kind)}
    if not any(name.startswith(f"{kind}.") for name in wanted):
        raise ValueError(f"{checkpoint} holds no EMA weights (ema.enabled was false): export with --no-ema.")
    full: dict[str, dict[str, Tensor]] = {"model": {}, kind: {}}
    for name, meta in wanted.items():
        section, _, parameter = name.partition(".")
        full[section][parameter] = torch.empty(meta.size, dtype=meta.properties.dtype)
    with warnings.catch_warnings():
        # PyTorch warns that it reads in one process, which is what no_dist asks for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(full, storage_reader=reader, no_dist=True)
    return full["model"] | full[kind]


def export(run_dir: Path, out: Path, step: int | None = None, ema: bool = True) -> Path:
    """Write one checkpoint's weights to a safetensors file.

    Args:
        run_dir: folder of the run.
        out: the file to write; parent folders are made.
        step: which checkpoint; the newest when None.
        ema: averaged weights rather than the trained ones.

    Returns:
        The file's path.
    """
    checkpoint = find_checkpoint(run_dir / "checkpoints", step)
    weights = {name: tensor.contiguous() for name, tensor in read_weights(checkpoint, ema).items()}
    metadata = {
        "format": "pt",
        "step": str(read_progress(checkpoint).step),
        "weights": "ema" if ema else "trained",
        "config": (run_dir / "config.toml").read_text(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, out, metadata)
    return out
