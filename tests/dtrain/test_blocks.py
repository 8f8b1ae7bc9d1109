"""Blocks are found by structure in models of many shapes."""

import pytest
from torch import nn

from dtrain.blocks import find_blocks
from tests.dtrain import sharded_worker


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


class UShape(nn.Module):
    """The shape of U-ViT: the same class in two lists and between them, beside lists of leaves."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.in_blocks = nn.ModuleList(Layer() for _ in range(depth // 2))
        self.mid_block = Layer()
        self.out_blocks = nn.ModuleList(Layer() for _ in range(depth // 2))
        self.single = nn.ModuleList([Other()])


@pytest.mark.parametrize("depth", [2, 4])
def test_u_shape_in_forward_order(depth: int) -> None:
    model = UShape(depth)
    assert find_blocks(model) == [*model.in_blocks, model.mid_block, *model.out_blocks]


def test_two_families_of_blocks() -> None:
    model = nn.Module()
    model.pairs = nn.ModuleList([Layer(), Layer()])
    model.singles = nn.ModuleList([Other(), Other()])
    assert find_blocks(model) == [*model.pairs, *model.singles]


def test_blocks_inside_a_wrapper_and_never_nested_ones() -> None:
    outer = [nn.Sequential(nn.ModuleList([Layer(), Layer()])) for _ in range(2)]
    model = nn.Sequential(nn.Sequential(Layer(), nn.Linear(2, 2)), nn.Sequential(nn.ModuleList(outer)))
    assert find_blocks(model) == outer


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("diffusers_dit", ["transformer_blocks"]),
        ("diffusers_wan", ["blocks"]),
        ("tiny_dit", ["blocks"]),
        ("uvit", ["in_blocks", "mid_block", "out_blocks"]),
    ],
)
def test_real_models(name: str, attributes: list[str]) -> None:
    model, _ = sharded_worker.MODELS[name]()
    expected: list[nn.Module] = []
    for attribute in attributes:
        found = getattr(model, attribute)
        expected += found if isinstance(found, nn.ModuleList) else [found]
    assert find_blocks(model) == expected


def test_no_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="No repeated blocks were found in Sequential"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_explicit_blocks_are_checked() -> None:
    model = UShape(4)
    assert find_blocks(model, [model.mid_block]) == [model.mid_block]
    with pytest.raises(ValueError, match="not part of the model"):
        find_blocks(model, [Layer()])
    with pytest.raises(ValueError, match=r"mid_block.parts is nested in block mid_block"):
        find_blocks(model, [model.mid_block, model.mid_block.parts])
