"""A block's forward pass as a region that is computed again in the backward pass, by PyTorch's checkpointing.

Tensors that are arguments of their own, positional or by name, PyTorch saves as the region's inputs: hooks on
saved tensors see these, and no others (see `stash`). All else that the block is given it keeps as it is.
torch.compile goes through a region and leaves the recomputation to its partitioner.
Source: https://docs.pytorch.org/docs/stable/checkpoint.html (non-reentrant)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

__all__ = ["Compiler", "Contexts", "Forward", "Outside", "Region", "cast_anew", "gradient_holder"]

Forward = Callable[..., Any]
Compiler = Callable[[Forward], Forward]
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


@contextmanager
def cast_anew() -> Iterator[None]:
    """Within, autocast casts parameters at every use and keeps no casts."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


class Region:
    """Calls `forward` and keeps its inputs and what the contexts save; the rest is computed again.

    Args:
        forward: of one block.
        contexts: makes the contexts of a call and of its recomputation. For torch.compile a function or a
            partial one of constants.
    """

    def __init__(self, forward: Forward, contexts: Contexts | None = None) -> None:
        self.forward = forward
        self.how: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # What `run` closes over lives until the backward pass: no tensors.
        forward, count, names = self.forward, len(args), tuple(kwargs)
        # PyTorch's contexts count operators, and a cast that a block before has left behind would be missing.
        counted = bool(self.how) and not torch.compiler.is_compiling()

        def run(*values: Any) -> Any:
            named = dict(zip(names, values[count:], strict=True))
            with cast_anew() if counted else nullcontext():
                return forward(*values[:count], **named)

        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False, **self.how)


class Outside:
    """A block's forward that does something which no compiled graph can hold; see `compile_inside`."""

    def compile_inside(self, compiler: Compiler) -> None:
        """Compile all that is called within."""
        raise NotImplementedError


def gradient_holder(output: Any) -> Tensor | None:
    """The first tensor of a block's output that has a backward pass."""
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return next((leaf for leaf in leaves if leaf.grad_fn is not None), None)
