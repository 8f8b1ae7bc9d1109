"""Fixtures that every test folder shares."""

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
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
