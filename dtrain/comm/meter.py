"""The meter: what the collectives sent, and what quantisation cost and lost.

Bytes are counted of every collective, on the host, as what a rank must send: (W - 1) messages to the W - 1
others, in rings and all-to-alls alike. Errors and times are taken only while `sample` is set, as they cost a
pass over the data each. Values on the device are read by `read` alone.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

log = logging.getLogger(__name__)

__all__ = ["Meter"]


class Meter:
    """Counts of one rank.

    Attributes:
        sample: take errors and times as well, from now on.
    """

    def __init__(self) -> None:
        self.sample = False
        self._bytes: Counter[str] = Counter()
        self._plain = 0
        self._calls: Counter[tuple[str, str]] = Counter()
        self._expected: dict[tuple[str, str], int] = {}
        self._squares: dict[str, list[Tensor]] = defaultdict(list)
        self._blocks: list[Tensor] = []
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._alarmed: set[tuple[str, str]] = set()

    def expect(self, unit: str, collective: str) -> None:
        """A unit's collective is configured to be compressed: `read` tells if it is not."""
        self._expected[unit, collective] = 0

    def sent(
        self,
        unit: str,
        collective: str,
        sent_bytes: int,
        plain_bytes: int,
        *,
        compressed: bool = True,
        training: bool = True,
    ) -> None:
        """Count one collective.

        Args:
            unit: whose.
            collective: "gather", "reduce" or "replicas".
            sent_bytes: bytes that this rank sent.
            plain_bytes: bytes that FSDP2 would have sent, in the dtype of its buffer.
            compressed: our codec served it.
            training: it serves a training step; what is gathered without gradients is exact by design.
        """
        self._bytes[collective] += sent_bytes
        self._plain += plain_bytes
        self._calls[unit, collective] += training
        if compressed and (unit, collective) in self._expected:
            self._expected[unit, collective] += 1

    def error(self, collective: str, error: Tensor, value: Tensor) -> None:
        """Note a quantisation error beside what was quantised, of any shapes."""
        squares = torch.stack([error.float().square().sum(), value.float().square().sum()])
        self._squares[collective].append(squares)

    def non_finite(self, blocks: Tensor | None) -> None:
        """Note how many blocks, a scalar, were not finite."""
        if blocks is not None:
            self._blocks.append(blocks)

    @contextmanager
    def codec_time(self, device: torch.device) -> Iterator[None]:
        """Count the time that codecs take inside, while sampling."""
        if not self.sample:
            yield
        elif device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            begun = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begun

    def read(self, steps: int = 1) -> dict[str, float]:
        """All since the last call, and begin anew; waits for the device where there is something to read.

        Args:
            steps: steps since then, of which bytes are the mean.
        Returns: `wire_mib` (what a rank sent a step, in 1024² bytes) in all and by collective, `wire_ratio`
            (bytes of FSDP2's own collectives over ours), `wire_error_gather`, `wire_error_reduce` (norm of
            the error over that of what was quantised, of sampled steps), `wire_codec_ms` (of all sampled
            steps), `wire_non_finite` (blocks), `wire_uncompressed` (collectives that should have been).
        """
        sent = sum(self._bytes.values())
        values = {"wire_mib": sent / steps / 2**20}
        values |= {f"wire_mib_{name}": n / steps / 2**20 for name, n in sorted(self._bytes.items())}
        values["wire_ratio"] = self._plain / sent if sent else 1.0
        for name, squares in sorted(self._squares.items()):
            error, value = torch.stack(squares).sum(dim=0).tolist()
            values[f"wire_error_{name}"] = (error / value) ** 0.5 if value else 0.0
        values["wire_codec_ms"] = 1000 * self._seconds + sum(
            a.elapsed_time(b) for a, b in self._synchronised()
        )
        values["wire_non_finite"] = float(sum(int(n) for n in self._blocks))
        values["wire_uncompressed"] = float(self._alarm())
        self._forget()
        return values

    def _synchronised(self) -> Iterable[tuple[torch.cuda.Event, torch.cuda.Event]]:
        for start, end in self._events:
            end.synchronize()
            yield start, end

    def _alarm(self) -> int:
        """How many expected collectives were not compressed; each is said once, by name."""
        if not any(self._calls.values()):
            return 0
        missing = [key for key, served in self._expected.items() if not served]
        for unit, collective in missing:
            if (unit, collective) not in self._alarmed:
                self._alarmed.add((unit, collective))
                log.warning(
                    "comm: the %s of %s is configured to be compressed, but none of its %d calls was: has "
                    "another collective been set on it, or is it not used?",
                    collective, unit, self._calls[unit, collective],
                )  # fmt: skip
        return len(missing)

    def _forget(self) -> None:
        self._bytes.clear()
        self._plain = 0
        self._calls.clear()
        self._expected = dict.fromkeys(self._expected, 0)
        self._squares.clear()
        self._blocks.clear()
        self._seconds = 0.0
        self._events.clear()
