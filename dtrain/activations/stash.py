"""Where the inputs of blocks wait for the backward pass: quantised, or in the host's memory.

Checkpointing keeps the inputs of every block, 2·N·D bytes a block in bf16, and once the rest is computed
again they are most of what is kept. PyTorch saves them through hooks on saved tensors, which give them to a
store in the forward pass and take them back for the recomputation.

What a block returns is an input of more than one: U-ViT's long skips are the next block's input too. So a
tensor is put away once, and whoever needs it shares that. It is known by its storage, place and version
rather than as an object, of which FSDP2's hooks make new ones.
Source: https://docs.pytorch.org/docs/stable/autograd.html#saved-tensors-hooks-doc
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dtrain.activations.meter import StashMeter
from dtrain.activations.region import Compiler, Forward, Outside
from dtrain.kernels.payload import Format
from dtrain.kernels.quantize import decode, encode

__all__ = ["Packed", "QuantisedStore", "Stash", "Stashed", "Store"]

log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Packed(Protocol):
    """A tensor that was put away."""


class Store(Protocol):
    """Where tensors are put away."""

    def put(self, tensor: Tensor) -> Any:
        """Take the values of a tensor, which may be overwritten or freed right after."""

    def fetch(self, packed: Any) -> Tensor:
        """A tensor of the same values, as far as the store keeps them; more than once if need be."""

    def prefetch(self, packed: Any) -> None:
        """`fetch` comes soon."""


class _Payload(NamedTuple):
    payload: Tensor
    shape: torch.Size
    dtype: torch.dtype


class QuantisedStore:
    """Keeps a code of 8 bits an element and a scale for 128 consecutive ones: 1.016 bytes an element.

    Args:
        format: how numbers are written; rounded to the nearest.
        meter: counts what is lost.
    """

    def __init__(self, format: Format, meter: StashMeter) -> None:
        self.format, self.meter = format, meter

    def put(self, tensor: Tensor) -> Any:
        flat = tensor.detach().reshape(-1)
        packed = _Box(_Payload(encode(flat, self.format), tensor.shape, tensor.dtype))
        self.meter.put(tensor.nbytes, packed.value.payload.nbytes)
        if self.meter.sample:
            self.meter.error(self.fetch(packed).view(-1).float() - flat, flat)
        return packed

    def fetch(self, packed: Any) -> Tensor:
        payload, shape, dtype = packed.value
        return decode(payload, shape.numel(), self.format, dtype=dtype).view(shape)

    def prefetch(self, packed: Any) -> None:
        pass


class _Box:
    """An object that can be referred to weakly."""

    def __init__(self, value: _Payload) -> None:
        self.value = value


class _Place(NamedTuple):
    """Which tensor it is. While a place is remembered, no other storage gets its number."""

    storage: StorageWeakRef
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


def _place(tensor: Tensor) -> _Place:
    storage = StorageWeakRef(tensor.untyped_storage())
    return _Place(storage, int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.dtype)


class _Call:
    """One call of a region: what it has put away, to be fetched together."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.packed: list[Any] = []


class _Kept(NamedTuple):
    """Stands for a saved tensor."""

    call: _Call
    packed: Any


class Stash:
    """Puts inputs of regions away.

    Args:
        store: where.
        first: of how many of the first blocks; those of later ones stay, unless an earlier one has put the
            same tensor away. 0: of all.
        meter: of the store.
        smallest: elements; smaller tensors stay.
    """

    def __init__(self, store: Store, meter: StashMeter, first: int = 0, smallest: int = 1) -> None:
        self.store, self.meter, self.first, self.smallest = store, meter, first, smallest
        self._said = False
        self._numbers = itertools.count()
        self._calls: WeakValueDictionary[int, _Call] = WeakValueDictionary()
        self._shared: dict[_Place, tuple[int, ReferenceType[Any]]] = {}

    @contextmanager
    def inputs(self, block: int, values: Sequence[Any]) -> Iterator[None]:
        """Within, tensors of `values` that autograd saves are put away; for the call of one region.

        Args:
            block: its number.
        """
        tensors = [value for value in values if isinstance(value, Tensor)]
        # A saved tensor has lost its version: it is taken here.
        versions = {_place(tensor): tensor._version for tensor in tensors if self._worth(tensor)}
        call, mine = _Call(next(self._numbers)), not self.first or block < self.first
        self._calls[call.number] = call
        if mine and not versions:
            self._say_small(tensors)

        def pack(tensor: Tensor) -> Any:
            version = versions.get(_place(tensor)) if self._worth(tensor) else None
            packed = None if version is None else self._packed(tensor, version, mine)
            if packed is None:
                return tensor
            call.packed.append(packed)
            return _Kept(call, packed)

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield

    def _worth(self, tensor: Tensor) -> bool:
        return _can_wait(tensor) and tensor.numel() >= self.smallest

    def _say_small(self, tensors: Sequence[Tensor]) -> None:
        """Once, where a block that should have its inputs put away keeps all of them."""
        small = [tuple(tensor.shape) for tensor in tensors if _can_wait(tensor)]
        if small and not self._said:
            self._said = True
            log.warning(
                "activations.stash: a block's inputs %s stay on the device, for they have fewer than "
                "activations.stash_smallest = %d elements",
                ", ".join(map(str, small)), self.smallest,
            )  # fmt: skip

    def _packed(self, tensor: Tensor, version: int, mine: bool) -> Any:
        place = _place(tensor)
        known_version, known = self._shared.get(place, (None, None))
        packed = known() if known is not None and known_version == version else None
        if packed is None and mine:
            self._forget()
            packed = self.store.put(tensor)
            self._shared[place] = version, ref(packed)
        return packed

    def _forget(self) -> None:
        gone = [p for p, (_, packed) in self._shared.items() if p.storage.expired() or packed() is None]
        for place in gone:
            del self._shared[place]

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        # The backward pass goes back through the calls: what this one needs first, then, to come while it
        # computes, the inputs of the one before.
        for packed in kept.call.packed:
            self.store.prefetch(packed)
        tensor = self.store.fetch(kept.packed)
        for packed in self._before(kept.call.number):
            self.store.prefetch(packed)
        return tensor

    def _before(self, number: int) -> Sequence[Any]:
        calls = [call for call in self._calls.values() if call.number < number and call.packed]
        return max(calls, key=lambda call: call.number).packed if calls else ()


def _can_wait(tensor: Tensor) -> bool:
    """Scalars and vectors, such as times and masks of numbers, are no rows of features."""
    return tensor.dtype in _DTYPES and tensor.dim() >= 2


class Stashed(Outside):
    """A region whose inputs are put away.

    Args:
        region: a `Region`, compiled or not.
        stash: where they go.
        block: the block's number.
    """

    def __init__(self, region: Forward, stash: Stash, block: int) -> None:
        self.region, self.stash, self.block = region, stash, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.region(*args, **kwargs)
        with self.stash.inputs(self.block, (*args, *kwargs.values())):
            return self.region(*args, **kwargs)

    def compile_inside(self, compiler: Compiler) -> None:
        self.region = compiler(self.region)
