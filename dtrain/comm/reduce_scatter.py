"""Summing gradients: encode, all-to-all, decode and sum, with error feedback.

FSDP2 hands the reduce-scatter rows (W, n), row r being this rank's gradients of what rank r keeps. Each row
becomes a message to its rank, which sums the W messages that it gets in fp32 and in the order of the ranks.
So a sum does not depend on how a network is laid out, and no number is rounded but once a hop.

    one level    W messages of four bits, say
    two levels   within the node W rows in `inside`, summed there; then N messages of the sums between nodes

Replicas sum their shards in the same way, each a part of them, and gather the sums of all parts encoded:
every replica decodes the same bytes, its own part included, so replicas stay equal bit for bit.

# See [Note: streams] in `all_gather`: here it is FSDP2's reduce-scatter and all-reduce streams.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import SymInt, Tensor

from dtrain.comm.codec import Codec
from dtrain.comm.collectives import all_gather, all_to_all
from dtrain.comm.config import Storage
from dtrain.comm.feedback import Residual
from dtrain.comm.fsdp import ReduceScatter, Unit
from dtrain.comm.meter import Meter
from dtrain.comm.packing import Packing, Segment
from dtrain.comm.topology import Levels

__all__ = ["GradientReduce", "ReplicaReduce"]


class Hop:
    """One exchange of messages: rows are encoded, sent, decoded and summed.

    Args:
        unit: name of the unit, and `collective` of what is counted.
        codec: of the rows.
        storage: of the residual.
        meter: counts.
    """

    def __init__(self, unit: str, collective: str, codec: Codec, storage: Storage, meter: Meter) -> None:
        self.unit, self.collective = unit, collective
        self.codec = codec
        self.residual = Residual(f"{unit} ({collective})", codec, storage)
        self.meter = meter

    def send(
        self, rows: Tensor, packing: Packing, of: tuple[int, ...], group: dist.ProcessGroup, per_rank: int = 1
    ) -> Tensor:
        """Send rows (W·m, n), m for each rank of the group: what came, (W, m, message bytes).

        Args:
            rows: overwritten where parameters are exact.
            packing: of the rows.
            of: the parameters that the rows hold.
            group: of W ranks.
            per_rank: m. Row i of a rank's is row i·W + rank: places of nodes change fastest.
        """
        residual = (
            self.residual.take(of, len(rows), rows.shape[1], rows.device) if packing.payload_bytes else None
        )
        self._measure(rows, packing, residual, group)
        with self.meter.codec_time(rows.device):
            messages = packing.empty(len(rows), rows.device)
            packing.pack(rows, messages, residual=residual)
        self.meter.non_finite(packing.non_finite(messages))
        messages = messages.view(per_rank, group.size(), -1).transpose(0, 1).contiguous()
        received = torch.empty_like(messages)
        all_to_all(received, messages, group)
        return received

    def _measure(
        self, rows: Tensor, packing: Packing, residual: Tensor | None, group: dist.ProcessGroup
    ) -> None:
        """The error of one row, encoded once more: of all rows it would be a pass over all gradients."""
        if not self.meter.sample or not packing.payload_bytes:
            return
        row = rows[group.rank() : group.rank() + 1].clone()
        message, back = packing.empty(1, rows.device), torch.empty_like(row, dtype=torch.float32)
        kept = None if residual is None else residual[group.rank() : group.rank() + 1].clone()
        packing.pack(row.clone(), message, residual=kept)
        packing.unpack(message, back)
        self.meter.error(self.collective, back - row.float(), row)


class GradientReduce(ReduceScatter):
    """Reduce-scatter of one unit; see the module.

    Args:
        unit: whose gradients.
        exact: of each parameter, whether it stays in full precision.
        codec: of the only hop, or of that between nodes.
        inside: of the hop within a node.
        levels: the nodes, or None for one hop.
        feedback: how the residual of `codec` is kept.
        meter: counts.
    """

    def __init__(
        self,
        unit: Unit,
        exact: Sequence[bool],
        *,
        codec: Codec,
        inside: Codec,
        levels: Levels | None,
        feedback: Storage,
        meter: Meter,
    ) -> None:
        self.unit = unit
        self.exact = exact
        self.levels = levels
        self.meter = meter
        self.divide = 1.0
        self.first = Hop(unit.name, "reduce", inside, "none", meter) if levels else None
        self.last = Hop(unit.name, "reduce", codec, feedback, meter)
        self._packing = lru_cache(maxsize=8)(self._make_packing)

    def allocate(self, size: Sequence[int | SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP2's buffers: the rows in its dtype, then the sum, which stays in fp32."""
        is_sum = size[0] == self._row_numel(self.unit.reduced)
        return torch.empty(*size, dtype=torch.float32 if is_sum else dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Write the sum of what ranks have for this one in (W·n,), / `divide`, to (n,)."""
        assert str(op) == str(dist.ReduceOp.SUM), f"FSDP2 was told to sum, but asks for {op}"
        of = self.unit.reduced
        rows = input_tensor.view(group.size(), -1)
        assert rows.shape[1] == self._row_numel(of), "FSDP2 reduces other parameters than were noted"
        sent = 0
        if self.first and self.levels:
            rows, sent = self._sum_inside(self.first, self.levels, rows, of)
            group = self.levels.between
        packing = self._packing(of, self.last.codec, rows.dtype)
        received = self.last.send(rows, packing, of, group)
        with self.meter.codec_time(rows.device):
            packing.unpack_sum(received, output_tensor[None], self.divide)
        sent += packing.message_bytes * (group.size() - 1)
        ranks = self.unit.shard_group.size()
        plain = input_tensor.nbytes // ranks * (ranks - 1)
        self.meter.sent(self.unit.name, "reduce", sent, plain, compressed=not packing.all_exact)

    def _sum_inside(self, hop: Hop, levels: Levels, rows: Tensor, of: tuple[int, ...]) -> tuple[Tensor, int]:
        """The node's sums (nodes, n) of what this place keeps, and the bytes that this rank sent."""
        packing = self._packing(of, hop.codec, rows.dtype)
        received = hop.send(rows, packing, of, levels.inside, per_rank=levels.nodes)
        sums = torch.empty(levels.nodes, rows.shape[1], dtype=torch.float32, device=rows.device)
        with self.meter.codec_time(rows.device):
            packing.unpack_sum(received, sums)
        return sums, packing.message_bytes * levels.nodes * (levels.places - 1)

    def _row_numel(self, of: tuple[int, ...]) -> int:
        return sum(self.unit.numels[i] for i in of)

    def _make_packing(self, of: tuple[int, ...], codec: Codec, dtype: torch.dtype) -> Packing:
        return Packing([Segment(self.unit.numels[i], self.exact[i]) for i in of], codec, dtype)


class ReplicaReduce:
    """All-reduce of one unit's sums over the copies of the model, in place; FSDP2 calls it as a hook.

    Args:
        unit: whose gradients.
        exact: see `GradientReduce`.
        codec, feedback: of both hops.
        meter: counts.
        group: the replicas.
    """

    def __init__(
        self,
        unit: Unit,
        exact: Sequence[bool],
        *,
        codec: Codec,
        feedback: Storage,
        meter: Meter,
        group: dist.ProcessGroup,
    ) -> None:
        self.unit = unit
        self.exact = exact
        self.group = group
        self.meter = meter
        self.divide = 1.0
        self.sums = Hop(unit.name, "replicas", codec, feedback, meter)
        self.parts = Residual(f"{unit.name} (replicas, gathered)", codec, feedback)

    def __call__(self, sums: Tensor) -> None:
        """Sum `sums` (n,) over the replicas, / `divide`, in place."""
        of, copies = self.unit.reduced, self.group.size()
        segments = [Segment(self.unit.numels[i], self.exact[i]) for i in of]
        whole = Packing(segments, self.sums.codec, torch.float32)
        exact = self._exact_sums(sums, whole)
        rows = self._rows(sums, copies)
        part = Packing([Segment(rows.shape[1], whole.all_exact)], self.sums.codec, torch.float32)
        sent = exact.nbytes * (copies - 1)
        if not whole.all_exact:
            sums.copy_(self._compressed_sums(rows, part, of)[: sums.numel()])
            sent += 2 * part.message_bytes * (copies - 1)
        whole.copy(whole.parts(exact), whole.of_rows(sums[None]))
        plain = 2 * sums.nbytes * (copies - 1) // copies
        self.meter.sent(self.unit.name, "replicas", sent, plain, compressed=not whole.all_exact)

    def _exact_sums(self, sums: Tensor, packing: Packing) -> Tensor:
        """(1, exact numbers) summed over replicas; those of `sums` become zero."""
        exact = sums.new_empty(1, packing.exact_numel)
        packing.copy(packing.of_rows(sums[None]), packing.parts(exact))
        for part in packing.of_rows(sums[None]):
            part.zero_()
        everybody = exact.new_empty(self.group.size(), packing.exact_numel)
        if packing.exact_numel:
            all_gather(everybody, exact, self.group)
        total = everybody[0].clone()
        for other in everybody[1:]:
            total += other
        return total[None] / self.divide

    def _rows(self, sums: Tensor, copies: int) -> Tensor:
        """One row of whole blocks for each replica, zeros at the end."""
        n = -(-sums.numel() // copies)
        rows = sums.new_zeros(copies, -(-n // 512) * 512)
        rows.view(-1)[: sums.numel()].copy_(sums)
        return rows

    def _compressed_sums(self, rows: Tensor, packing: Packing, of: tuple[int, ...]) -> Tensor:
        """The sums of all replicas, as every one of them decodes them: (Σ of rows,)."""
        received = self.sums.send(rows, packing, of, self.group)
        mine = torch.empty_like(rows[:1])
        packing.unpack_sum(received, mine, self.divide)
        message = packing.empty(1, rows.device)
        packing.pack(mine, message, residual=self.parts.take(of, 1, mine.shape[1], mine.device))
        messages = packing.empty(len(rows), rows.device)
        all_gather(messages, message, self.group)
        packing.unpack(messages, rows)
        return rows.view(-1)
