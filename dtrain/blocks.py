"""Finding the repeated blocks of a transformer: the unit of sharding, checkpointing and compile.

Name lists fail across model families, so blocks are found by structure: a class of which the outermost
ModuleLists hold two or more instances is a block class; its instances elsewhere in the tree (U-ViT's
`mid_block`) are blocks too. Leaf modules are never blocks, and nothing inside a block is looked at.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from torch import nn


def find_blocks(model: nn.Module, explicit: Sequence[nn.Module] | None = None) -> list[nn.Module]:
    """Return the model's blocks in order of registration, which is forward order in practice.

    Args:
        model: any module.
        explicit: the blocks, when the caller knows them; checked to be part of the model and not nested.

    Raises:
        ValueError: no block was found, or an explicit one is foreign or nested in another.
    """
    blocks = list(explicit) if explicit is not None else _blocks_by_structure(model)
    if not blocks:
        raise ValueError(
            f"No repeated blocks were found in {type(model).__name__}: no class stands twice in its "
            "ModuleLists. Pass the blocks explicitly (Recipe.blocks, or the blocks argument)."
        )
    _check_disjoint(model, blocks)
    return blocks


def named_blocks(model: nn.Module, explicit: Sequence[nn.Module] | None = None) -> dict[str, nn.Module]:
    """The same by their names in the model."""
    names = {module: name for name, module in model.named_modules()}
    return {names[block]: block for block in find_blocks(model, explicit)}


def _blocks_by_structure(model: nn.Module) -> list[nn.Module]:
    members = [m for m in _outermost_list_members(model) if _is_composite(m)]
    counts = Counter(type(member) for member in members)
    repeated = {cls for cls, count in counts.items() if count >= 2}
    in_lists = {id(member) for member in members if type(member) in repeated}
    # A Sequential says nothing about what is in it, so other Sequentials are no kin of those in the lists.
    kin = repeated - {nn.Sequential}
    return list(_outermost(model, lambda module: id(module) in in_lists or type(module) in kin))


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _outermost_list_members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _outermost_list_members(child)


def _outermost(module: nn.Module, is_block: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    for child in module.children():
        if is_block(child):
            yield child
        else:
            yield from _outermost(child, is_block)


def _check_disjoint(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    for block in blocks:
        if id(block) not in names:
            raise ValueError(f"A block of class {type(block).__name__} is not part of the model.")
        inner = {id(module) for module in block.modules()} - {id(block)}
        nested = [names[id(other)] for other in blocks if id(other) in inner]
        if nested:
            raise ValueError(f"Block {nested[0]} is nested in block {names[id(block)]}: name only the outer.")
