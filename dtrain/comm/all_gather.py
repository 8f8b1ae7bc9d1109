"""Gathering parameters: quantised from this rank's fp32 masters, decoded alike by every rank.

FSDP2 casts its shard to the compute dtype and hands the all-gather a buffer (W·n,), the input being a view of
this rank's n numbers in it. `WeightGather` leaves that cast alone: it encodes the masters, gathers messages,
and writes all W rows from them, its own included. A rank that kept its own numbers would compute with other
weights than its peers. Rounding is to nearest, so the backward gets the weights of the forward.

`DeltaGather` holds a reference R (W, n), the same on every rank. Where the masters have changed since it last
looked, it gathers the difference of masters to R in four bits and adds what it stands for to R. What rounding
takes is part of the next difference, so errors do not pile up (Jia et al., "SDP4Bit", arXiv 2410.15526). The
backward, and every further forward of the step, read R and send nothing.

Without gradients (evaluation, sampling) parameters are gathered as FSDP2 would, and R stays as it is.

[Note: streams] FSDP2 calls on its all-gather stream, after the optimizer's. Every kernel and collective here
is issued on that stream, and what outlives a call (R) is used nowhere else; so no buffer is freed or written
while another stream reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import SymInt, Tensor

from dtrain.comm.codec import Cast, Codec
from dtrain.comm.collectives import all_gather
from dtrain.comm.fsdp import AllGather, Unit
from dtrain.comm.meter import Meter
from dtrain.comm.packing import Packing, Segment
from dtrain.comm.reference import Reference

__all__ = ["DeltaGather", "Session", "WeightGather"]


@dataclass
class Session:
    """What all units of a model share.

    Attributes:
        meter: counts.
        training: whether the forward that runs will have a backward.
    """

    meter: Meter
    training: bool = True


class WeightGather(AllGather):
    """All-gather of one unit; see the module.

    Args:
        unit: whose parameters.
        codec: how they are written.
        exact: of each parameter, whether it stays in full precision.
        session: shared by the model's units.
    """

    def __init__(self, unit: Unit, codec: Codec, exact: Sequence[bool], session: Session) -> None:
        self.unit = unit
        self.codec = codec
        self.session = session
        self.segments = [Segment(n, e) for n, e in zip(unit.numels, exact, strict=True)]
        self._packing: Packing | None = None

    def allocate(self, size: Sequence[int | SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP2's buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill `output_tensor` (W·n,) with every rank's `input_tensor` (n,), as the codec leaves it.

        Returns None also where `async_op` asks for a handle: all is ordered on the stream of the call.
        """
        training = self.unit.in_backward or self.session.training
        resharded = input_tensor.numel() != sum(self.unit.numels)  # by reshard_after_forward=int
        as_it_is = self.codec == Cast(output_tensor.dtype)
        if training and not (resharded or as_it_is or self._packs(output_tensor.dtype).all_exact):
            self.gather(output_tensor, group)
            return
        all_gather(output_tensor, input_tensor, group)
        self._count(output_tensor, input_tensor.nbytes, group, compressed=as_it_is, training=training)

    def gather(self, output: Tensor, group: dist.ProcessGroup) -> None:
        """Fill FSDP2's buffer (W·n,)."""
        packing, meter = self._packs(output.dtype), self.session.meter
        masters = self.unit.masters()
        sample = masters.clone() if meter.sample else None
        with meter.codec_time(output.device):
            message = packing.empty(1, output.device)
            packing.pack(masters[None], message)
        messages = self._exchange(packing, message, group)
        rows = output.view(group.size(), -1)
        with meter.codec_time(output.device):
            packing.unpack(messages, rows)
        if sample is not None:
            meter.error("gather", rows[group.rank()].float() - sample, sample)
        self._count(output, message.nbytes, group)

    def _exchange(self, packing: Packing, message: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Everybody's messages (W, message bytes)."""
        messages = packing.empty(group.size(), message.device)
        all_gather(messages, message, group)
        self.session.meter.non_finite(packing.non_finite(message))
        return messages

    def _packs(self, dtype: torch.dtype) -> Packing:
        """Exact parameters travel in the dtype that the model computes in."""
        if self._packing is None or self._packing.exact_dtype != dtype:
            self._packing = Packing(self.segments, self.codec, dtype)
        return self._packing

    def _count(
        self,
        output: Tensor,
        nbytes: int,
        group: dist.ProcessGroup,
        compressed: bool = True,
        training: bool = True,
    ) -> None:
        others = group.size() - 1
        plain = output.nbytes // group.size() * others
        self.session.meter.sent(
            self.unit.name, "gather", nbytes * others, plain, compressed=compressed, training=training
        )


class DeltaGather(WeightGather):
    """All-gather of one unit by differences to a reference that all ranks hold; see the module.

    Args:
        unit, codec, exact, session: see `WeightGather`; the codec writes differences.
        keep: how the reference is kept.
    """

    def __init__(
        self, unit: Unit, codec: Codec, exact: Sequence[bool], session: Session, keep: Literal["bf16", "int8"]
    ) -> None:
        super().__init__(unit, codec, exact, session)
        self.reference = Reference(keep, sum(unit.numels))
        self._versions: tuple[int, ...] = ()

    def gather(self, output: Tensor, group: dist.ProcessGroup) -> None:
        """Bring the reference up to date where masters have changed, and copy it to FSDP2's buffer."""
        packing, versions = self._packs(output.dtype), self.unit.versions()
        rows = output.view(group.size(), -1)
        sent = 0
        if not self.reference.ready:
            sent += self._begin(packing, group)
        if versions != self._versions:
            sent += self._update(packing, group)
        self._versions = versions
        self.reference.read(rows)
        packing.copy(packing.parts(self.reference.exact), packing.of_rows(rows))
        if self.session.meter.sample and sent:
            masters = self.unit.masters()
            self.session.meter.error("gather", rows[group.rank()].float() - masters, masters)
        self._count(output, sent, group)

    def _begin(self, packing: Packing, group: dist.ProcessGroup) -> int:
        """Gather the saved row of every rank, or its masters, without loss of what the reference can hold."""
        own = self.reference.saved
        if own is None:
            masters = self.unit.masters()[None]
            for part in packing.of_rows(masters):
                part.zero_()
            own = self.reference.pack(masters)
        everybody = own.new_empty(group.size(), own.shape[1])
        all_gather(everybody, own, group)
        self.reference.begin(everybody)
        self._versions = ()
        return own.nbytes

    def _update(self, packing: Packing, group: dist.ProcessGroup) -> int:
        """Gather differences and add them."""
        meter, masters = self.session.meter, self.unit.masters()
        with meter.codec_time(masters.device):
            message = packing.empty(1, masters.device)
            packing.pack(masters[None], message, minus=self.reference.own(group.rank()))
        messages = self._exchange(packing, message, group)
        with meter.codec_time(masters.device):
            self.reference.add(packing.payload(messages), packing.codec)
        self.reference.exact = packing.exact(messages).clone()  # a view would keep all messages
        return message.nbytes
