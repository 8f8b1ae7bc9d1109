"""Selective checkpointing: outputs of some operators are kept, all else of a block is computed again.

Which ones pay is a matter of bytes a FLOP. For B·N tokens of width D, a product D → D keeps B·N·D elements
and saves 2·B·N·D² FLOPs; attention keeps as many and saves 4·B·N²·D, which is 2·N/D times as much. At the
lengths of videos (N ≫ D) nothing is as cheap to keep.

An operator that draws random numbers is never kept: the draws of those behind it would move, and the
recomputed dropout would not be the one of the forward pass.
Source: https://pytorch.org/blog/activation-checkpointing-techniques/
"""

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dtrain.activations.region import gradient_holder

__all__ = ["GROUPS", "OpInstance", "check_names", "draws", "instance_contexts", "name_contexts", "watch"]

_log = logging.getLogger(__name__)

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": (
        "dtrain::attention_forward",
        "dtrain::qkv_attention_forward",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "aten::_cudnn_attention_forward",
    ),
    "linear": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_mm",
        "dtrain::gelu_linear",
        "dtrain::skip_linear",
        "dtrain::chunked_mlp",
    ),
}

OpInstance = tuple[str, int]
"""An operator's name and the how-many-th call of it in a block is meant, from 0."""


def check_names(save: Sequence[str]) -> None:
    """Raise ValueError where a name is neither that of a group nor one of operators."""
    for name in save:
        if name not in GROUPS and "::" not in name:
            near = get_close_matches(name, GROUPS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"activations.save: {name!r} is no group of operators: {hint}Use "
                f"{' or '.join(map(repr, GROUPS))}, or a glob over operators such as 'aten::*mm*'."
            )


def draws(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this call of an operator draws from a random generator."""
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
        return False
    names = [argument.name for argument in op._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    return float(args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)) > 0


class _ByName:
    """Keeps what operators of these names return.

    Args:
        save: groups and globs.
    """

    def __init__(self, save: tuple[str, ...]) -> None:
        self.save = save
        self._matched: set[str] = set()
        self._refused: set[str] = set()
        self._found: dict[Any, tuple[str, ...]] = {}

    def __call__(self, _context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        by = self._found.get(op)
        if by is None:
            by = self._found[op] = tuple(name for name in self.save if _matches(op.name(), name))
            self._matched.update(by)
        if not by or self._random(op, args, kwargs):
            return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE

    def unmatched(self) -> list[str]:
        """Names that no operator has; none where no operator was seen, as behind the compiler's cache."""
        return [name for name in self.save if self._found and name not in self._matched]

    def _random(self, op: Any, args: Any, kwargs: Any) -> bool:
        if not draws(op, args, kwargs):
            return False
        if op.name() not in self._refused:
            self._refused.add(op.name())
            _log.warning("activations.save: %s draws random numbers: it is computed again.", op.name())
        return True


def _matches(op_name: str, name: str) -> bool:
    return any(fnmatchcase(op_name, glob) for glob in GROUPS.get(name, (name,)))


# torch.compile takes contexts of constants only. So a model's blocks share their state by a number.
@functools.cache
def _by_name(save: tuple[str, ...], _owner: int) -> _ByName:
    return _ByName(save)


def name_contexts(save: tuple[str, ...], owner: int) -> tuple[Any, Any]:
    """Contexts that keep what operators of these groups and globs return.

    Args:
        owner: a number that the blocks of a model share.
    """
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_by_name(save, owner))
    return contexts


class _Seen:
    """Whether the calls that are to be kept come at all, over all regions with one choice."""

    def __init__(self) -> None:
        self.regions = 0
        self.calls: set[OpInstance] = set()


@functools.cache
def _seen(_chosen: tuple[OpInstance, ...], _owner: int) -> _Seen:
    return _Seen()


class _ByInstance:
    """Keeps what some calls of operators return.

    Args:
        chosen: which.
        calls: to which those that come are added.
    """

    def __init__(self, chosen: tuple[OpInstance, ...], calls: set[OpInstance]) -> None:
        self._chosen, self._names = set(chosen), {name for name, _ in chosen}
        self._counts: Counter[tuple[bool, str]] = Counter()
        self._calls = calls

    def __call__(self, context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        name = op.name()
        if name not in self._names:
            return CheckpointPolicy.PREFER_RECOMPUTE
        # PyTorch before 2.13 asks in the recomputation as well.
        key = bool(context.is_recompute), name
        call, self._counts[key] = (name, self._counts[key]), self._counts[key] + 1
        if call not in self._chosen:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self._calls.add(call)
        return CheckpointPolicy.MUST_SAVE


def instance_contexts(chosen: tuple[OpInstance, ...], owner: int) -> tuple[Any, Any]:
    """Contexts that keep what these calls of operators return; `owner` as above."""
    seen = _seen(chosen, owner)
    seen.regions += 1
    missing = [f"{name} {index}" for name, index in chosen if (name, index) not in seen.calls]
    if seen.regions == 2 and missing:  # the first region is through by now
        _log.warning(
            "activations: %s should be kept but was not called: more is computed again than was chosen.",
            ", ".join(missing),
        )
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_ByInstance(chosen, seen.calls))
    return contexts


def watch(blocks: Sequence[nn.Module], save: tuple[str, ...], owner: int) -> None:
    """Say, once all blocks have run, which names have matched no operator."""
    handles: list[Any] = []

    def check(_grad: Any) -> None:
        if handles:
            _take_off(handles)
            for name in _by_name(save, owner).unmatched():
                _log.warning("activations.save: %r matched no operator of the blocks.", name)

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = gradient_holder(output) if torch.is_grad_enabled() else None
        if tensor is not None:
            tensor.register_hook(check)

    handles += [block.register_forward_hook(hook) for block in blocks]


def _take_off(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
