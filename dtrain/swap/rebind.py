"""A function run with other globals: somebody else's code calls our attention and is otherwise as it was.

A model's layer reads `scaled_dot_product_attention` from its module, which other models share. So the
function gets a copy of its module's globals in which that one name, or a module on the way to it (`F`, `nn`,
`torch`), has a stand-in. Nothing is patched, nothing is added to a call, and torch.compile traces through.
The copy is taken once: what the module rebinds later is not seen.
Source: https://docs.python.org/3/reference/datamodel.html#user-defined-functions
"""

import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Attend = Callable[..., Any]
_SDPA = "scaled_dot_product_attention"
_DISPATCH = "dispatch_attention_fn"


def calls_attention(function: Any) -> bool:
    """Whether a function's own code names PyTorch's attention, or diffusers' one door to it."""
    return isinstance(function, FunctionType) and not {_SDPA, _DISPATCH}.isdisjoint(_names(function.__code__))


def with_attention(function: FunctionType, stand_in: Callable[[Attend, int], Attend]) -> FunctionType:
    """The function with its attention replaced.

    Args:
        function: one that `calls_attention`.
        stand_in: gets the attention that the function would call and the dim of its tokens, 2 for
            (B, H, N, D) or 1 for diffusers' (B, N, H, D), and returns what is called instead.
    """
    functional = _copy(F, **{_SDPA: stand_in(F.scaled_dot_product_attention, 2)})
    layers = _copy(nn, functional=functional)
    modules = {id(F): functional, id(nn): layers, id(torch): _copy(torch, nn=layers)}

    def replace(value: Any) -> Any:
        if value is F.scaled_dot_product_attention:
            return getattr(functional, _SDPA)
        if inspect.isfunction(value) and value.__name__ == _DISPATCH:
            return stand_in(value, 1)
        return modules.get(id(value), value)

    # torch.compile looks globals up in the module that __name__ tells, which is not where these are.
    scope = {name: replace(value) for name, value in function.__globals__.items() if name != "__name__"}
    return _rescoped(function, scope)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _copy(module: ModuleType, **changed: Any) -> ModuleType:
    stand_in = ModuleType(module.__name__)
    kept = {name: value for name, value in vars(module).items() if name != "__spec__"}
    stand_in.__dict__.update(kept, **changed)
    return stand_in


def _rescoped(function: FunctionType, scope: dict[str, Any]) -> FunctionType:
    copy = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.__qualname__, copy.__doc__ = function.__qualname__, function.__doc__
    return copy
