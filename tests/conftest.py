"""Fixtures that every test folder shares."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def single_process_group() -> Iterator[None]:
    """A default process group of this one process, on gloo."""
    from dtrain.dist import process_group

    with process_group():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU its tests are skipped; but with DTRAIN_REHEARSAL=1 those that say so run on the CPU."""
    if not torch.cuda.is_available():
        for item in items:
            marker = item.get_closest_marker("gpu")
            rehearsed = marker and marker.kwargs.get("rehearsal") and os.environ.get("DTRAIN_REHEARSAL")
            if marker and not rehearsed:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
