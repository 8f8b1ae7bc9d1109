"""State on the host while a GPU computes: where everything is, and the bits of state on the device.

Where no GPU is, the same runs are rehearsed on the CPU, where both are the same.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dtrain import offload_gpu_worker
from tests.launch import torchrun

pytestmark = [pytest.mark.gpu(rehearsal=True), pytest.mark.distributed]


def run(ranks: int, folder: Path, *presets: str) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torchrun(ranks, Path(offload_gpu_worker.__file__), folder / "out.pt", folder, device, *presets)
    found: dict[str, Any] = torch.load(folder / "out.pt")
    return found


def check(name: str, on_device: dict[str, Any], offloaded: dict[str, Any]) -> None:
    """Rounding by chance has the same bits on CPU and GPU; PyTorch's own AdamW in fp32 nearly so."""
    for either in (on_device, offloaded):
        assert either["same_after_evaluation"], name
        assert either["sharded"], name
    for key, x in on_device["weights"].items():
        y = offloaded["weights"][key]
        assert x.dtype == y.dtype
        if name.endswith("bf16"):
            assert x.equal(y), f"{name}: {key}"
        else:
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
    torch.testing.assert_close(offloaded["evaluated"], on_device["evaluated"], rtol=1e-4, atol=1e-5)
    assert offloaded["norms"] == pytest.approx(on_device["norms"], rel=1e-5), name
    if torch.cuda.is_available():
        assert (on_device["places"], offloaded["places"]) == ({"cuda"}, {"cpu"})
        assert on_device["held"] > offloaded["held"] == 0
        assert on_device["buffers"] == offloaded["buffers"] == {"cuda"}
        assert offloaded["pinned"]
        assert not on_device["pinned"]


def test_one_rank_and_its_checkpoints(tmp_path: Path) -> None:
    found = run(1, tmp_path, "none")
    assert found.pop("to host")
    assert found.pop("to device")
    for name, (on_device, offloaded) in found.items():
        check(name, on_device, offloaded)


def test_compressed_collectives_of_two_ranks(tmp_path: Path) -> None:
    found = run(2, tmp_path, "int8-int4", "int4-delta")
    assert len(found) == 4
    for name, (on_device, offloaded) in found.items():
        check(name, on_device, offloaded)
