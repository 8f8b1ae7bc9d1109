"""One budget of bytes for what all blocks of a rank keep, spent where it saves the most work.

The first forward pass with new shapes runs every block as `full`, and what its operators cost is measured on
the way, on fake tensors. As its backward pass begins, the calls that wait for it are known, and `solve`
chooses for each. From the next pass on the choice holds, for calls of that block with these shapes.

What counts: bytes that blocks keep between forward and backward beyond their inputs, which are what blocks
before them return. Of an operator that is kept all that it returns; of a block that keeps everything what
autograd saves. Parameters do not count.

Ranks choose alike without a word, as they have the same shapes and the same formulas.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.activations.kinds import describe, describe_module
from dtrain.activations.measure import Measured, measure
from dtrain.activations.region import Compiler, Forward, Outside, Region, gradient_holder
from dtrain.activations.selective import GROUPS, OpInstance, instance_contexts
from dtrain.activations.solve import Option, options, richer_last, solve
from dtrain.activations.stash import Stash, Stashed

__all__ = ["Budget", "Budgeted", "Choice"]

_log = logging.getLogger(__name__)

_GRAPHS = 64
_NOTHING: tuple[OpInstance, ...] = ()


class _Key(NamedTuple):
    """Calls that share a choice.

    Args:
        block: its number.
        kind: its structure and its inputs, see `kinds`.
    """

    block: int
    kind: Hashable


class Choice(NamedTuple):
    """What was chosen for the calls of one forward pass.

    Args:
        options: for each call.
        kept_bytes: in all.
        recomputed_flops, forward_flops: in all.
    """

    options: tuple[Option, ...]
    kept_bytes: int
    recomputed_flops: int
    forward_flops: int


class _Waiting:
    """A call whose backward pass is to come. Its graph owns it: where that is dropped, nothing waits."""

    def __init__(self, budget: "Budget", key: _Key) -> None:
        self.budget, self.key = budget, key

    def __call__(self, _grad: Any) -> None:
        self.budget.backward_begins()


class Budget:
    """What the blocks of a model share.

    Args:
        budget_bytes: see the module.
    Attributes:
        choices: made so far, in order.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.choices: list[Choice] = []
        self._structures: dict[Hashable, int] = {}
        self._measured: dict[Hashable, Measured] = {}
        self._chosen: dict[_Key, Option] = {}
        self._numbers = itertools.count()
        self._waiting: WeakValueDictionary[int, _Waiting] = WeakValueDictionary()

    def structure(self, block: nn.Module) -> int:
        """A number that equal blocks share."""
        return self._structures.setdefault(describe_module(block), len(self._structures))

    def saved(self, key: _Key) -> tuple[OpInstance, ...] | None:
        """What a call keeps; None is everything."""
        option = self._chosen.get(key)
        return _NOTHING if option is None else option.saved

    def measure(self, key: _Key, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Measure a call unless one of its kind was."""
        if key.kind in self._measured:
            return
        try:
            self._measured[key.kind] = measure(forward, args, kwargs)
        except Exception as error:  # a third party's block may do anything
            self._measured[key.kind] = Measured((), 0, 0, 0, 0)
            _log.warning(
                "activations: block %d cannot be measured without running it (%s): it recomputes everything.",
                key.block, str(error).partition("\n")[0],
            )  # fmt: skip

    def called(self, key: _Key, output: Any) -> None:
        """Note a call; its backward pass will tell."""
        holder = gradient_holder(output)
        if holder is not None:
            waiting = _Waiting(self, key)
            self._waiting[next(self._numbers)] = waiting
            holder.register_hook(waiting)

    def backward_begins(self) -> None:
        """Choose, if calls are waiting that have no choice yet."""
        keys = [waiting.key for _, waiting in sorted(self._waiting.items())]
        self._waiting.clear()
        if any(key not in self._chosen for key in keys):
            self._choose(keys)

    def _choose(self, keys: Sequence[_Key]) -> None:
        calls = Counter(keys)  # in the order of their first calls
        measured = [self._measured[key.kind] for key in calls]
        fronts = {
            key: _times(_options(m), count) for (key, count), m in zip(calls.items(), measured, strict=True)
        }
        places = solve(list(fronts.values()), self.budget_bytes)
        places = richer_last(places, [(key.kind, count) for key, count in calls.items()])
        chosen = [front[place] for front, place in zip(fronts.values(), places, strict=True)]
        for (key, count), option in zip(calls.items(), chosen, strict=True):
            self._adopt(key, option._replace(bytes=option.bytes // count))
        forward = sum(m.forward_flops * count for m, count in zip(measured, calls.values(), strict=True))
        self._say(
            Choice(tuple(chosen), sum(o.bytes for o in chosen), sum(o.flops for o in chosen), forward), calls
        )

    def _adopt(self, key: _Key, option: Option) -> None:
        # A call may be part of passes of several shapes, such as that of a text beside videos. The option
        # with the fewest bytes keeps all of them within the budget.
        known = self._chosen.get(key)
        if known is None or option.bytes < known.bytes:
            self._chosen[key] = option

    def _say(self, choice: Choice, calls: Counter[_Key]) -> None:
        self.choices.append(choice)
        if dist.is_initialized() and dist.get_rank():
            return
        counts: Counter[str] = Counter()
        for option, count in zip(choice.options, calls.values(), strict=True):
            counts[_label(option)] += count
        share = choice.recomputed_flops / choice.forward_flops if choice.forward_flops else 0.0
        _log.info(
            "activations: budget %.2f GiB: %s; %.2f GiB kept; %.1f %% of the blocks' forward FLOPs are "
            "recomputed",
            self.budget_bytes / 2**30, _list_of(counts), choice.kept_bytes / 2**30, 100 * share,
        )  # fmt: skip


def _options(measured: Measured) -> list[Option]:
    if measured.forward_flops == 0:  # not measured, or without products: nothing to gain
        return [Option(0, 0, 0, _NOTHING)]
    return options(measured.ops, measured.full_flops, measured.pass_bytes, measured.everything_bytes)


def _times(front: Sequence[Option], count: int) -> list[Option]:
    return [Option(o.bytes * count, o.flops * count, o.work * count, o.saved) for o in front]


def _label(option: Option) -> str:
    if option.saved is None:
        return "everything"
    attention = GROUPS["attention"]
    names = Counter("attention" if n in attention else n.partition("::")[2] for n, _ in option.saved)
    return " + ".join(f"{count} {name}" if count > 1 else name for name, count in names.items()) or "nothing"


def _list_of(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {'calls keep' if n > 1 else 'call keeps'} {label}" for label, n in counts.items())


class Budgeted(Outside):
    """A block's forward that keeps what the budget has chosen.

    Args:
        block: whose `forward` is replaced.
        number: the block's.
        budget: shared by all blocks.
        stash: where inputs of regions go; those of a block that keeps everything stay.
        owner: see `selective.name_contexts`.
    """

    def __init__(
        self, block: nn.Module, number: int, budget: Budget, stash: Stash | None, owner: int
    ) -> None:
        self.block, self.forward, self.number = block, block.forward, number
        self.budget, self.stash, self.owner = budget, stash, owner
        self._compiler: Compiler | None = None
        self._runs: dict[tuple[OpInstance, ...] | None, Forward] = {}
        self._structures: dict[bool, int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._run(None)(*args, **kwargs)
        key = self._key(args, kwargs)
        self.budget.measure(key, self.forward, args, kwargs)
        output = self._run(self.budget.saved(key))(*args, **kwargs)
        self.budget.called(key, output)
        return output

    def compile_inside(self, compiler: Compiler) -> None:
        # Each choice is a graph of its own, and past the limit blocks would quietly run without the compiler.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
        self._compiler = compiler
        self._runs.clear()

    def _key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Key:
        # Structures are read once: walking the modules at every call would cost more than launching kernels.
        training = self.block.training
        if training not in self._structures:
            self._structures[training] = self.budget.structure(self.block)
        inputs = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        device = next((x.device.type for x in inputs), "cpu")
        return _Key(self.number, (self._structures[training], describe((args, kwargs)), _autocast(device)))

    def _run(self, saved: tuple[OpInstance, ...] | None) -> Forward:
        """What runs a call that keeps `saved`; made, and compiled, where it is first needed."""
        if saved not in self._runs:
            self._runs[saved] = self._made(saved)
        return self._runs[saved]

    def _made(self, saved: tuple[OpInstance, ...] | None) -> Forward:
        run: Forward = self.forward
        if saved is not None:
            run = Region(run, partial(instance_contexts, saved, self.owner) if saved else None)
        if self._compiler is not None:
            run = self._compiler(run)
        return run if saved is None or self.stash is None else Stashed(run, self.stash, self.number)


def _autocast(device: str) -> Hashable:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return str(torch.get_autocast_dtype(device))
