"""What a block's operators cost and keep, without running it: on fake tensors, from its inputs' shapes.

The block's own forward runs once under three observers, in which every operator, every storage that it makes
and every tensor that autograd saves is seen in order:

    bytes of an operator = storages that are new in what it returns
    bytes of `none`      = storages made in the block and saved by autograd
    FLOPs of `full`      = those of operators that begin before the last tensor is saved

The last is where PyTorch stops to compute again. What the block returns is the next one's input and counts
nowhere, nor do parameters, nor what was there before. FLOPs are by PyTorch's registry of formulas.
Source: https://github.com/pytorch/pytorch/blob/main/torch/utils/flop_counter.py
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from dtrain.activations.region import cast_anew
from dtrain.activations.selective import draws
from dtrain.activations.solve import Op

__all__ = ["Measured", "measure"]

# Attention that PyTorch has no formula for.
_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
}


class Measured(NamedTuple):
    """What a block's forward pass costs.

    Args:
        ops: calls whose outputs may be kept so that FLOPs are saved, in order.
        everything_bytes: kept where nothing is computed again.
        forward_flops: of the forward pass.
        full_flops: computed again where nothing is kept.
        pass_bytes: written again then by operators without FLOPs.
    """

    ops: tuple[Op, ...]
    everything_bytes: int
    forward_flops: int
    full_flops: int
    pass_bytes: int


class _Call(NamedTuple):
    op: Op
    storages: frozenset[int]
    random: bool


class _Recorder(TorchDispatchMode):
    """All calls of operators in order.

    Args:
        fake: the mode in which they run.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        self.calls: list[_Call] = []
        self.made: dict[int, int] = {}  # bytes by storage
        self._known: dict[int, Any] = {}  # keeps storages, so that none gets the address of another
        self._counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Of a parameter one fake tensor for all calls, or a view of it would pass for a new storage.
        args, kwargs = tree_map_only(Tensor, self._as_fake, (tuple(args), kwargs or {}))
        place = len(self.calls)
        self.calls.append(_Call(Op(("", 0), 0, 0), frozenset(), False))  # it begins here
        self._new(tree_leaves((args, kwargs)))
        out = func(*args, **kwargs)
        new = self._new(tree_leaves(out))
        self.made |= new
        name = func.name()
        op = Op((name, self._counts[name]), sum(new.values()), _flops(func, args, kwargs, out))
        self._counts[name] += 1
        self.calls[place] = _Call(op, frozenset(new), draws(func, args, kwargs))
        return out

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    def _new(self, leaves: Sequence[Any]) -> dict[int, int]:
        storages = {place_of(leaf): leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)}
        new = {place: storage for place, storage in storages.items() if place not in self._known}
        self._known |= new
        return {place: storage.nbytes() for place, storage in new.items()}


def place_of(tensor: Tensor) -> int:
    """What tell storages that are alive apart."""
    place: int = tensor.untyped_storage()._cdata
    return place


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func.name() in _ATTENTION:
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))
    formula = flop_registry.get(getattr(func, "_overloadpacket", func))
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def measure(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Measured:
    """Measure one call of a block's forward, with the autocast and gradient mode of now.

    Args:
        forward: bound to the block; its parameters are read for their shapes only.
        args, kwargs: as the block gets them.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recorder, saved, begun = _Recorder(fake), set(), [0]

    def save(tensor: Tensor) -> Tensor:
        saved.add(place_of(tensor))
        begun[0] = len(recorder.calls)
        return tensor

    # Autocast would keep fake casts of real parameters.
    with cast_anew(), fake:
        args, kwargs = tree_map_only(Tensor, _fake, (tuple(args), dict(kwargs)))
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), recorder:
            output = forward(*args, **kwargs)
    returned = {place_of(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)}
    return _summary(recorder, saved - returned, returned, begun[0])


def _fake(tensor: Tensor) -> Tensor:
    """A tensor without values; called in a fake mode."""
    return torch.empty_strided(
        tensor.shape,
        tensor.stride(),
        dtype=tensor.dtype,
        device=tensor.device,
        requires_grad=tensor.requires_grad,
    )


def _summary(recorder: _Recorder, saved: set[int], returned: set[int], begun: int) -> Measured:
    again = [call for call in recorder.calls[:begun] if call.op.flops]
    passes = [call for call in recorder.calls[:begun] if not call.op.flops]
    kept = [
        call.op._replace(bytes=sum(recorder.made[place] for place in call.storages - returned))
        for call in again
        if not call.random and call.storages
    ]
    return Measured(
        tuple(kept),
        sum(recorder.made.get(place, 0) for place in saved),
        sum(call.op.flops for call in recorder.calls),
        sum(call.op.flops for call in again),
        sum(call.op.bytes for call in passes),
    )
