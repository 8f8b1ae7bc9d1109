"""Activation policies on two real ranks: the bits of `none`, and no all-gather more."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dtrain import activations_worker
from tests.dtrain.activation_models import B, D
from tests.launch import torchrun

pytestmark = pytest.mark.distributed

TOKENS = 129  # of the U-ViT


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("activations") / "results.json"
    torchrun(2, Path(activations_worker.__file__), out)
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    return found


def test_the_bits_of_none(results: dict[str, list[dict[str, Any]]]) -> None:
    assert len(results) == sum(1 + len(policies) for policies in activations_worker.RUNS.values())
    for name, ranks in results.items():
        for rank in ranks:
            assert rank["same_loss"], name
            assert rank["same_names"], name
            assert rank["same_grads"] or name.endswith("int8"), name
            assert rank["distance"] < 0.02, name
    assert all(rank["distance"] > 0 for rank in results["uvit-float32-int8"])


def test_no_collective_more(results: dict[str, list[dict[str, Any]]]) -> None:
    for name, ranks in results.items():
        model = name.rpartition("-")[0]
        wanted = results[f"{model}-none"][0]["calls"]
        assert sum(wanted.values()) > 10
        assert [rank["calls"] for rank in ranks] == [wanted] * 2, name


def test_what_is_put_away_is_that_of_the_residual_stream(results: dict[str, list[dict[str, Any]]]) -> None:
    """Five blocks, the skips among their inputs; two bytes an element in bf16."""
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for policy in ("host", "int8"):
            for rank in results[f"uvit-{dtype}-{policy}"]:
                assert rank["stashed"] == 2 * 5 * B * TOKENS * D * size  # micro-batches


def test_ranks_choose_alike(results: dict[str, list[dict[str, Any]]]) -> None:
    for name, (one, other) in results.items():
        assert one["choices"] == other["choices"]
        assert len(one["choices"]) == ("budget" in name)
