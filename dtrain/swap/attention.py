"""Swap the attention of a model that knows nothing of dtrain for `kernels.attention`, in place.

A layer keeps its own code, parameters, norms and rotations; only the call of PyTorch's attention becomes
ours, so outputs and gradients stay equal up to rounding. Found are, in this order:

1. modules with an `attention_backend` attribute, made for this: it is set;
2. diffusers' attention, by its `processor` (https://huggingface.co/docs/diffusers/api/attnprocessor);
3. modules of timm's form that compute softmax by hand, see `packed`;
4. any module whose `forward` calls PyTorch's `scaled_dot_product_attention`.

What looks like attention and is none of these is left and listed. A call that ours cannot serve (a mask,
dropout) stays what it was; that is said once, and listed too.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn

from dtrain.kernels.attention import Backend
from dtrain.swap import packed
from dtrain.swap.calls import stand_in
from dtrain.swap.forward import is_replaced, is_swapped, set_forward
from dtrain.swap.rebind import calls_attention, with_attention
from dtrain.swap.report import Swap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionConfig:
    """Who computes the model's attention."""

    swap: bool = field(
        default=True,
        metadata={
            "help": "Let every attention layer that is recognised, diffusers' and timm's too, call dtrain's "
            "attention; false: leave the model's own."
        },
    )
    backend: Backend = field(
        default="auto",
        metadata={
            "help": "Who serves: auto picks what was measured to be fastest, triton is dtrain's kernel, "
            "sdpa is PyTorch's, reference stores all scores (slow, for comparison)."
        },
    )

    def __post_init__(self) -> None:
        if not self.swap and self.backend != "auto":
            raise ValueError(
                f"backend = {self.backend}: without effect while swap = false; swap = true, or auto."
            )


def swap_attention(model: nn.Module, backend: Backend = "auto") -> Swap:
    """Let a model's attention layers call `kernels.attention.attention`. Works in place, also on meta.

    Apply before activation policy, compile and sharding. Names of parameters stay as they are, and a second
    call changes the backend. What was chosen by diffusers' `set_attention_backend` stays.

    Args:
        model: any module.
        backend: as `kernels.attention.attention` takes it.

    Returns: what was swapped and what was left, and why; also logged.
    """
    swapper = _Swapper(backend)
    for name, module in _layers(model):
        swapper.visit(name, module)
    log.log(logging.WARNING if swapper.done.left else logging.INFO, "attention: %s", swapper.done)
    return swapper.done


class _Swapper:
    """One call of `swap_attention`: a kind of layer gets one function, so that one graph serves them all."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.done = Swap()
        self.made: dict[tuple[type, Any], Any] = {}

    def visit(self, name: str, module: nn.Module) -> None:
        """Swap one layer, or list why not."""
        kind, reason = self._swap(module)
        if reason:
            self.done.left[name] = reason
        else:
            self.done.swapped[name] = kind

    def _swap(self, module: Any) -> tuple[str, str]:
        cls = type(module)
        if _is_ours(module):
            module.attention_backend = self.backend
            return cls.__name__, ""
        if _has_processor(module):
            return self._swap_processor(module)
        if is_swapped(module):
            del module.forward
        if is_replaced(module):
            return "", "its forward was replaced before: swap the attention first"
        if not (packed.is_packed(module) and not _is_fused(module)):
            return self._swap_forward(module)
        reason = packed.refusal(module)
        if not reason:
            set_forward(module, self._once(cls, packed.forward_of, cls))
        return cls.__name__, reason

    def _swap_forward(self, module: nn.Module) -> tuple[str, str]:
        cls = type(module)
        if not calls_attention(cls.forward):
            return "", f"{cls.__name__} does not call PyTorch's scaled_dot_product_attention"
        set_forward(module, self._once(cls, _redirected, cls.forward))
        return cls.__name__, ""

    def _swap_processor(self, module: Any) -> tuple[str, str]:
        processor = module.processor
        cls = getattr(type(processor), "_swapped_from", type(processor))
        if not calls_attention(cls.__call__):
            return "", f"{cls.__name__} does not call PyTorch's scaled_dot_product_attention"
        processor = copy.copy(processor)  # other models may share it
        processor.__class__ = self._once(cls, _processor_class, cls)
        getattr(module, "set_processor", lambda new: setattr(module, "processor", new))(processor)
        return cls.__name__, ""

    def _once(self, cls: type, make: Callable[..., Any], argument: Any) -> Any:
        if (cls, make) not in self.made:
            self.made[cls, make] = make(argument, self.backend, self._note(cls.__name__))
        return self.made[cls, make]

    def _note(self, kind: str) -> Callable[[str], None]:
        kept = self.done.kept

        @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
        def note(why: str) -> None:  # called, not traced, by torch.compile
            if why not in kept.get(kind, ()):
                kept.setdefault(kind, set()).add(why)
                log.warning("attention: calls of %s with %s stay with PyTorch's attention", kind, why)

        return cast(Callable[[str], None], note)


def _redirected(function: FunctionType, backend: Backend, note: Callable[[str], None]) -> FunctionType:
    return with_attention(function, stand_in(backend, note))


def _processor_class(cls: Any, backend: Backend, note: Callable[[str], None]) -> type:
    call = _redirected(cls.__call__, backend, note)
    members = {"__call__": call, "__module__": cls.__module__, "_swapped_from": cls}
    return type(cls.__name__, (cls,), members)


def _is_fused(module: nn.Module) -> bool:
    """Whether a module of timm's form calls PyTorch's attention, which newer ones decide by a flag."""
    return calls_attention(type(module).forward) and getattr(module, "fused_attn", True)


def _is_ours(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attention_backend", None), str)


def _has_processor(module: nn.Module) -> bool:
    return callable(getattr(module, "processor", None))


def _is_attention(module: nn.Module) -> bool:
    known = _is_ours(module) or _has_processor(module) or packed.is_packed(module)
    return known or calls_attention(type(module).forward)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that are attention, then layers that are only called so and hold none of the former."""
    found = {name: module for name, module in model.named_modules() if _is_attention(module)}
    yield from found.items()
    for name, module in model.named_modules():
        looks = any(word in type(module).__name__.lower() for word in ("attention", "attn"))
        related = any(_holds(name, other) or _holds(other, name) for other in found)
        if looks and not related:
            yield name, module


def _holds(outer: str, inner: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")
